//! `dvcr pvc-importer`.

use std::path::PathBuf;

use anyhow::{Context, ensure};
use clap::ValueEnum;
use dvcr_image::{AuthStore, ClientOptions, Credentials, Reference};
use dvcr_importer::{ErrorKind, PopulateRequest, PopulateSummary, TargetFormat, populate};
use dvcr_worker::metrics::Family;
use dvcr_worker::volume::Volume;
use dvcr_worker::{quantity, retry, termination};

use super::importer::{authentication, is_given};
use super::{Secret, boolean, path};
use crate::work::{self, Usage};
use crate::worker::{self, chain};
use crate::{sandbox, source};

/// Unit of a disk's size, bytes.
const SECTOR_BYTES: u64 = 512;
/// Permission bits of the file: whoever runs the machine belongs to the volume's group.
const FILE_MODE: u32 = 0o660;
/// Threads that one core keeps busy: one decodes while the other waits for the registry.
const THREADS_MIN: usize = 2;

/// Fills a volume with an image from a registry, as the worker of an operator
///
/// Does what `dvcr populate` does, told by the environment: a raw disk on the block device, or, where there is none, a qcow2 file.
/// What an earlier run has left of the file is removed first. Tries again for a quarter of an hour what fails in passing; serves
/// metrics, and leaves a report. Exit codes: 0 done; 1 failed; 2 wrong usage; 130 and 143 stopped by SIGINT and SIGTERM.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// What the source is
    #[arg(long, env = "IMPORTER_SOURCE", value_enum, value_name = "KIND", default_value_t = Kind::Registry)]
    source: Kind,

    // A text, because clap shows what it cannot parse, and people write passwords into references.
    /// Where the image is: docker://host[:port]/repository[:tag][@digest]
    #[arg(long, env = "IMPORTER_ENDPOINT", value_name = "REFERENCE", hide_env_values = true)]
    endpoint: String,

    /// Credentials of the registry, as docker and podman keep them
    #[arg(long, env = "IMPORTER_AUTH_CONFIG", value_name = "FILE", value_parser = path)]
    auth_config: Option<PathBuf>,

    /// User of the registry, where there is no file with credentials
    #[arg(long, env = "IMPORTER_ACCESS_KEY_ID", value_name = "USER", hide_env_values = true)]
    access_key_id: Option<String>,

    /// Password of that user; better given by the environment, which others do not see
    #[arg(long, env = "IMPORTER_SECRET_KEY", value_name = "PASSWORD", hide_env_values = true)]
    secret_key: Option<Secret>,

    /// Accept any certificate of the registry, and plain HTTP; true or false
    #[arg(long, env = "INSECURE_TLS", value_name = "BOOL", default_value = "false", value_parser = boolean)]
    insecure_tls: bool,

    /// Folder with certificates (PEM) that that of the registry may come from
    #[arg(long, env = "IMPORTER_CERT_DIR", value_name = "DIR", value_parser = path)]
    cert_dir: Option<PathBuf>,

    /// Folder with certificates (PEM) that that of a proxy may come from
    #[arg(long, env = "IMPORTER_PROXY_CERT_DIR", value_name = "DIR", value_parser = path)]
    proxy_cert_dir: Option<PathBuf>,

    /// The block device to fill, if there is one at this path
    #[arg(long, value_name = "FILE", default_value = "/dev/pvc-importer-block-volume")]
    block_device: PathBuf,

    /// The file to make if there is no block device
    #[arg(long, value_name = "FILE", default_value = "/data/disk.img")]
    file: PathBuf,

    /// Most bytes of the disk, as Kubernetes writes sizes; by default as many as the volume takes
    #[arg(long, env = "IMPORTER_IMAGE_SIZE", value_name = "SIZE", value_parser = image_size)]
    image_size: Option<ImageSize>,

    /// Share of the filesystem's room that is left alone, from 0 to 1
    #[arg(long, env = "FILESYSTEM_OVERHEAD", value_name = "SHARE", default_value = "0", value_parser = overhead)]
    filesystem_overhead: f64,

    /// What the image is to become: a disk
    #[arg(long, env = "IMPORTER_CONTENTTYPE", value_enum, value_name = "TYPE", default_value_t = Content::Kubevirt)]
    contenttype: Content,

    /// Threads that read and decode, 2 to 16; by default one per core, from 2 to 8
    #[arg(long, env = "IMPORTER_QEMU_CONVERT_THREADS", value_name = "N", value_parser = threads)]
    convert_threads: Option<Threads>,

    /// Taken, and of no meaning here: nothing goes by way of a scratch volume
    #[arg(long, env = "IMPORTER_DIRECT_TRANSFER", value_name = "BOOL", default_value = "false", value_parser = boolean)]
    direct_transfer: bool,

    /// Taken, and of no meaning here: --log says what is logged
    #[arg(short = 'v', long = "verbosity", default_value = "", hide_default_value = true, value_name = "N")]
    verbosity: String,

    #[command(flatten)]
    worker: worker::Args,

    #[command(flatten)]
    limits: crate::limits::Args,
}

/// The kinds of sources.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Kind {
    /// An image in a registry
    Registry,
}

/// The kinds of content.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Content {
    /// The disk of a machine
    Kubevirt,
}

/// Bytes, if there is a bound.
#[derive(Clone, Copy, Debug)]
struct ImageSize(Option<u64>);

fn image_size(text: &str) -> Result<ImageSize, String> {
    if text.is_empty() {
        return Ok(ImageSize(None));
    }
    quantity::parse(text).map(|bytes| ImageSize(Some(bytes)))
}

fn overhead(text: &str) -> Result<f64, String> {
    if text.is_empty() {
        return Ok(0.0);
    }
    let share = text.parse().ok().filter(|share| (0.0..1.0).contains(share));
    share.ok_or_else(|| "write a number from 0 to below 1, such as 0.055".to_owned())
}

/// A number of threads, if it was told.
#[derive(Clone, Copy, Debug)]
struct Threads(Option<usize>);

fn threads(text: &str) -> Result<Threads, String> {
    if text.is_empty() {
        return Ok(Threads(None));
    }
    let number: Option<usize> = text.parse().ok().filter(|number| *number > 0);
    let number = number.ok_or_else(|| "write a number of threads from 1 on".to_owned())?;
    Ok(Threads(Some(number.max(THREADS_MIN))))
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let volume = Volume::find(&args.block_device, &args.file);
    let outcome =
        args.worker.confine(&[&sandbox::place_of(volume.path())]).and_then(|()| transfer(&args, &volume));
    args.worker.leave(&match &outcome {
        Ok(_) => termination::import_complete(),
        Err(error) => termination::unable_to_process(&chain(error)),
    });
    println!("{}", serde_json::to_string_pretty(&outcome?).context("printing the summary")?);
    Ok(())
}

fn transfer(args: &Args, volume: &Volume) -> anyhow::Result<PopulateSummary> {
    let request = request(args, volume)?;
    let title = volume.path().display().to_string();
    work::run(&title, |progress| async move {
        let (_metrics, _server) = args.worker.serve(Family::Volume, progress.clone()).await?;
        let filled = retry::run(&progress, || populate(request.clone(), progress.clone())).await;
        let too_large = filled.as_ref().is_err_and(|error| error.kind() == ErrorKind::TooLarge);
        let filled = filled.map_err(anyhow::Error::from);
        if too_large { filled.context("A larger PVC is required") } else { filled }
    })
}

fn request(args: &Args, volume: &Volume) -> anyhow::Result<PopulateRequest> {
    let reference: Reference =
        args.endpoint.trim_start_matches("docker://").parse().context(Usage("--endpoint"))?;
    let client = client(args, &reference)?;
    let shown = volume.path().display();
    let cleared = volume.clear();
    cleared.with_context(|| format!("cannot remove {shown}, which an earlier run has left"))?;
    let usable = volume.usable_bytes(args.filesystem_overhead);
    let usable = usable.with_context(|| format!("cannot tell how much room there is for {shown}"))?;
    let asked = args.image_size.and_then(|ImageSize(bytes)| bytes);
    let size_max = asked.map_or(usable, |asked| asked.min(usable));
    tracing::info!(volume = %shown, usable_bytes = usable, size_bytes_max = size_max, "the volume is there");
    let (format, size) = match volume {
        // All of the device is written, so that nothing old stays behind the disk.
        Volume::Block(_) => (TargetFormat::Raw, None),
        Volume::File(_) => (TargetFormat::Qcow2, Some(size_max - size_max % SECTOR_BYTES)),
    };
    ensure!(size_max >= SECTOR_BYTES, "A larger PVC is required: there is no room for a disk at {shown}");
    Ok(PopulateRequest {
        reference,
        target: volume.path().to_owned(),
        size,
        size_max: Some(size_max),
        format,
        workers: args.convert_threads.and_then(|Threads(number)| number),
        mode: Some(FILE_MODE),
        client,
        limits: args.limits.limits(),
    })
}

fn client(args: &Args, reference: &Reference) -> anyhow::Result<ClientOptions> {
    let file = args.auth_config.as_deref().filter(|path| is_given(path));
    let auth = match (file, &args.access_key_id, &args.secret_key) {
        (None, Some(user), Some(secret)) if !user.is_empty() => {
            let (username, password) = (user.clone(), secret.reveal().to_owned());
            AuthStore::single(reference.host(), Credentials { username, password })
        }
        _ => authentication(file)?,
    };
    let folders = [&args.cert_dir, &args.proxy_cert_dir].into_iter().flatten().filter(|path| path.is_dir());
    let network = source::network(&folders.cloned().collect::<Vec<_>>())?;
    Ok(ClientOptions { insecure: args.insecure_tls, auth, network })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_an_operator_leaves_empty_is_not_given() {
        assert_eq!(image_size("").unwrap().0, None);
        assert_eq!(image_size("1Gi").unwrap().0, Some(1 << 30));
        assert!(image_size("much").is_err());
        assert_eq!((overhead("").unwrap(), overhead("0.06").unwrap()), (0.0, 0.06));
        for bad in ["-0.1", "1", "NaN", "a tenth"] {
            assert!(overhead(bad).is_err(), "{bad}");
        }
        assert_eq!(threads("").unwrap().0, None);
        assert_eq!((threads("1").unwrap().0, threads("5").unwrap().0), (Some(2), Some(5)));
        assert!(threads("0").is_err() && threads("many").is_err());
    }
}
