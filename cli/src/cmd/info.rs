//! `dvcr info`.

use std::path::PathBuf;

use anyhow::Context;
use dvcr_converter::file::{self, Input, Inspection};
use dvcr_converter::io::Value;
use serde_json::json;

use super::Output;
use crate::size::Human;
use crate::work;

/// Tells what a disk image file is: format, sizes, compression around it.
///
/// The content decides, never the name. The image is not trusted: its tables are checked inside fixed limits.
#[derive(Debug, clap::Args)]
pub struct Args {
    /// The image file or block device.
    file: PathBuf,
    /// The disk of an OVA to tell about, by its id or its file; by default the first one.
    #[arg(long, value_name = "NAME")]
    disk: Option<String>,
    /// How to print the answer; json names its fields as `qemu-img info` does.
    #[arg(long, value_enum, default_value_t = Output::Human)]
    output: Output,
    #[command(flatten)]
    limits: crate::limits::Args,
    #[command(flatten)]
    sandbox: crate::sandbox::Args,
}

/// Runs the command.
pub fn run(args: Args) -> anyhow::Result<()> {
    let limits = args.limits.limits();
    let (path, disk) = (args.file.clone(), args.disk);
    let name = path.display().to_string();
    args.sandbox.confine(&[])?;
    let inspection = work::run(&name, |progress| async move {
        let inspect = move || {
            let input = Input { path: &path, disk: disk.as_deref() };
            file::inspect(input, &limits, &progress)
        };
        Ok(tokio::task::spawn_blocking(inspect).await??)
    })
    .with_context(|| format!("cannot tell what {name} is"))?;
    match args.output {
        Output::Human => print!("{}", human(&name, &inspection)),
        Output::Json => println!("{:#}", json(&name, &inspection)),
    }
    Ok(())
}

fn human(name: &str, inspection: &Inspection) -> String {
    let info = &inspection.info;
    let bytes = |bytes: u64| format!("{} ({bytes} bytes)", Human(bytes));
    let mut text = format!("image: {name}\nformat: {}\n", info.format);
    if !inspection.wrappers.is_empty() {
        text += &format!("compressed with: {}\n", wrappers(inspection).join(", then "));
    }
    text += &format!("virtual size: {}\n", bytes(info.virtual_size));
    text += &format!("file length: {}\n", bytes(info.file_bytes));
    text += &format!("disk usage: {}\n", bytes(inspection.allocated_bytes));
    if let Some(bytes) = info.details.cluster_size {
        text += &format!("cluster size: {bytes}\n");
    }
    if let Some(dirty) = info.details.dirty {
        text += &format!("dirty: {dirty}\n");
    }
    for (name, value) in &info.details.specific {
        text += &format!("{}: {}\n", name.replace('-', " "), shown(value));
    }
    text
}

fn json(name: &str, inspection: &Inspection) -> serde_json::Value {
    let info = &inspection.info;
    let mut value = json!({
        "filename": name,
        "format": info.format.to_string(),
        "virtual-size": info.virtual_size,
        "actual-size": inspection.allocated_bytes,
        "file-length": info.file_bytes,
        "wrappers": wrappers(inspection),
    });
    if let Some(bytes) = info.details.cluster_size {
        value["cluster-size"] = bytes.into();
    }
    if let Some(dirty) = info.details.dirty {
        value["dirty-flag"] = dirty.into();
    }
    if !info.details.specific.is_empty() {
        let data = object(&info.details.specific);
        value["format-specific"] = json!({ "type": info.format.to_string(), "data": data });
    }
    value
}

fn object(fields: &[(&str, Value)]) -> serde_json::Value {
    fields
        .iter()
        .map(|(name, value)| ((*name).to_owned(), plain(value)))
        .collect::<serde_json::Map<_, _>>()
        .into()
}

fn plain(value: &Value) -> serde_json::Value {
    match value {
        Value::Bool(value) => (*value).into(),
        Value::Number(value) => (*value).into(),
        Value::Text(value) => value.as_str().into(),
        Value::List(list) => list.iter().map(|fields| object(fields)).collect(),
    }
}

fn shown(value: &Value) -> String {
    match value {
        Value::Text(text) => text.clone(),
        other => plain(other).to_string(),
    }
}

fn wrappers(inspection: &Inspection) -> Vec<String> {
    inspection.wrappers.iter().map(ToString::to_string).collect()
}
