//! Shows the main job: an image published over HTTP is imported into our registry, and a disk made from it boots.

use std::process::ExitCode;

/// What a shell reports for a program that Ctrl-C ended.
const INTERRUPTED: u8 = 130;

fn main() -> ExitCode {
    if let Err(error) = stop_at_ctrl_c() {
        eprintln!("demo: Ctrl-C will not clean up: {error}");
    }
    match dvcr_tests::main_job(false) {
        Ok(done) => {
            println!("\nThe disk boots. What each step took:\n{}", done.table());
            ExitCode::SUCCESS
        }
        // Children that were killed make the job fail; its directories are gone by now.
        Err(_) if dvcr_tests::interrupted() => {
            eprintln!("demo: interrupted; everything is cleaned up");
            ExitCode::from(INTERRUPTED)
        }
        Err(error) => {
            eprintln!("demo: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn stop_at_ctrl_c() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    std::thread::spawn(move || {
        runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => {}
                _ = terminate.recv() => {}
            }
        });
        dvcr_tests::interrupt();
    });
    Ok(())
}
