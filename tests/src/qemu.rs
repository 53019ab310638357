//! QEMU as the oracle of disk formats and as the machine that boots what we made.

use crate::process::Process;
use crate::{cmd, run, workspace};
use anyhow::{Context, Result, bail};
use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

/// A kernel under KVM is there in one or two seconds.
const KVM_PROBE_TIMEOUT: Duration = Duration::from_secs(8);
const BOOT_TIMEOUT: Duration = Duration::from_secs(10 * 60);
const CONSOLE_BYTES_MAX: usize = 1 << 20;
const MEMORY_MIB: u32 = 768;

/// Runs qemu-img and returns what it prints.
pub fn qemu_img(args: &[&str]) -> Result<String> {
    run(&cmd("qemu-img", args))
}

/// Converts an image with qemu-img.
pub fn convert(source: &Path, source_format: &str, target: &Path, target_format: &str) -> Result<()> {
    let mut command = cmd("qemu-img", ["convert", "-f", source_format, "-O", target_format]);
    run(command.arg(source).arg(target)).map(drop)
}

/// Checks with qemu-img that two images hold the same disk, their sizes included.
pub fn assert_same_disk(left: &Path, left_format: &str, right: &Path, right_format: &str) -> Result<()> {
    // Without `-s`, which also wants the same places allocated, but then a tail of zeros is no difference.
    let sizes = (virtual_size(left, left_format)?, virtual_size(right, right_format)?);
    if sizes.0 != sizes.1 {
        bail!("{} has {} bytes, {} has {}", left.display(), sizes.0, right.display(), sizes.1);
    }
    let mut command = cmd("qemu-img", ["compare", "-f", left_format, "-F", right_format]);
    run(command.arg(left).arg(right)).map(drop)
}

/// Returns the virtual size of an image in bytes.
pub fn virtual_size(image: &Path, format: &str) -> Result<u64> {
    let text = run(cmd("qemu-img", ["info", "--output=json", "-f", format]).arg(image))?;
    let info: serde_json::Value = serde_json::from_str(&text)?;
    info["virtual-size"].as_u64().with_context(|| format!("no virtual size in {text}"))
}

/// How a guest's instructions are executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// The processor's own virtualization.
    Kvm,
    /// QEMU's translator: always there, some ten times slower.
    Tcg,
}

impl Accelerator {
    /// Chooses KVM when it really runs a guest here, which is tried once per boot of this machine.
    ///
    /// The guest is the kernel of `disk`, which is not written to: where virtual machines nest, the firmware may run and
    /// the kernel hang.
    pub fn choose(disk: &Path, format: &str) -> Self {
        if kvm_works_here(disk, format) { Self::Kvm } else { Self::Tcg }
    }

    fn args(self) -> [&'static str; 4] {
        match self {
            Self::Kvm => ["-accel", "kvm", "-cpu", "host"],
            Self::Tcg => ["-accel", "tcg,thread=multi", "-cpu", "max"],
        }
    }
}

/// Boots a disk and returns the serial console's text up to and with `prompt`.
pub fn boot(disk: &Path, format: &str, accelerator: Accelerator, prompt: &str) -> Result<String> {
    watch_console(&machine(disk, format, accelerator), prompt, BOOT_TIMEOUT)
}

fn machine(disk: &Path, format: &str, accelerator: Accelerator) -> Command {
    let drive = format!("file={},format={format},if=virtio,cache=unsafe", disk.display());
    let memory = MEMORY_MIB.to_string();
    let mut command = cmd("qemu-system-x86_64", accelerator.args());
    command.args(["-m", &memory, "-smp", "2", "-nographic", "-no-reboot", "-net", "none", "-drive", &drive]);
    command
}

/// Runs a virtual machine whose console is its standard output, until `wanted` appears there.
fn watch_console(command: &Command, wanted: &str, timeout: Duration) -> Result<String> {
    let deadline = Instant::now() + timeout;
    let mut process = Process::spawn(command, [Stdio::null(), Stdio::piped(), Stdio::inherit()])?;
    let mut pipe = process.child.stdout.take().context("the console is a pipe")?;
    let (sender, pieces) = mpsc::channel();
    // Detached: when the process hangs in the kernel, its pipe never ends.
    std::thread::spawn(move || {
        let mut block = vec![0; 4096];
        while let Ok(n) = pipe.read(&mut block) {
            if n == 0 || sender.send(block[..n].to_vec()).is_err() {
                break;
            }
        }
    });
    let mut console = String::new();
    let failed = loop {
        match pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => console.push_str(&String::from_utf8_lossy(&piece)),
            Err(RecvTimeoutError::Timeout) => break format!("did not come in {} s", timeout.as_secs()),
            Err(RecvTimeoutError::Disconnected) => {
                break "did not come before the machine stopped".to_owned();
            }
        }
        if console.contains(wanted) {
            return Ok(console);
        }
        if console.len() > CONSOLE_BYTES_MAX {
            break format!("is not in the first {CONSOLE_BYTES_MAX} bytes");
        }
    };
    bail!("{wanted:?} {failed}: {}\n--- console\n{console}", process.line)
}

/// Tells whether /dev/kvm runs a guest; it may be there and hang whoever opens it, or hang the guest.
fn kvm_works_here(disk: &Path, format: &str) -> bool {
    if !Path::new("/dev/kvm").exists() {
        return false;
    }
    // A hung probe may not even be killed, so the answer is kept and asked for only once per boot.
    let boot_id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
    let kept = workspace().join(".cache").join(format!("kvm-{}", boot_id.trim()));
    match std::fs::read_to_string(&kept).as_deref() {
        Ok(WORKS) => return true,
        Ok(FAILS) => return false,
        _ => {}
    }
    let works = match probe(disk, format, Accelerator::Kvm, KVM_PROBE_TIMEOUT) {
        Ok(()) => true,
        Err(_) if crate::interrupted() => return false,
        Err(error) => {
            eprintln!("KVM is not used: {}", error.to_string().lines().next().unwrap_or_default());
            false
        }
    };
    let _ = std::fs::create_dir_all(workspace().join(".cache"));
    let _ = std::fs::write(&kept, if works { WORKS } else { FAILS });
    works
}

const WORKS: &str = "works";
const FAILS: &str = "hangs or fails";

/// Boots a disk, without writing to it, until its kernel starts the first program.
fn probe(disk: &Path, format: &str, accelerator: Accelerator, timeout: Duration) -> Result<()> {
    let mut command = machine(disk, format, accelerator);
    watch_console(command.arg("-snapshot"), "Run /init as init process", timeout).map(drop)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_probe_sees_a_working_accelerator() {
        let image = crate::fixture::debian_image().unwrap();
        probe(&image, "qcow2", Accelerator::Tcg, BOOT_TIMEOUT).unwrap();
    }

    #[test]
    fn a_silent_machine_is_given_up_at_the_deadline() {
        let started = Instant::now();
        let error = watch_console(&cmd("sleep", ["600"]), "login:", Duration::from_millis(300)).unwrap_err();
        assert!(error.to_string().contains("sleep 600"), "{error}");
        assert!(started.elapsed() < Duration::from_secs(30));
    }
}
