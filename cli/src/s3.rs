//! Where a source in an S3 bucket is, and who reads it.

use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use dvcr_importer::source::s3::{S3Credentials, S3Options};

/// Largest file of credentials, bytes.
const FILE_BYTES_MAX: u64 = 64 << 10;
const ENV_ENDPOINT: &str = "AWS_ENDPOINT_URL_S3";
const ENV_REGION: &str = "AWS_REGION";

/// The options of a source `s3://...`. A key is never an argument, which everybody on the machine could read.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
pub struct Args {
    /// The server of s3:// sources; AWS by default.
    #[arg(long, value_name = "URL", env = ENV_ENDPOINT)]
    s3_endpoint: Option<String>,
    /// The region of s3:// sources; us-east-1 by default.
    #[arg(long, value_name = "REGION", env = ENV_REGION)]
    s3_region: Option<String>,
    /// Who reads s3:// sources: aws_access_key_id, aws_secret_access_key and perhaps aws_session_token, each on a line
    /// `name = value`. By default the variables of these names, in capitals, or IMPORTER_ACCESS_KEY_ID and
    /// IMPORTER_SECRET_KEY; else nobody in particular.
    #[arg(long, value_name = "FILE")]
    s3_credentials: Option<PathBuf>,
}

impl Args {
    /// The options, with what the environment and the file of credentials tell.
    pub fn options(&self, env: impl Fn(&str) -> Option<String>) -> anyhow::Result<S3Options> {
        let given = |name: &str| env(name).filter(|value| !value.is_empty());
        let credentials = match &self.s3_credentials {
            Some(file) => Some(read(file)?),
            None => {
                let pairs = [
                    ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"),
                    ("IMPORTER_ACCESS_KEY_ID", "IMPORTER_SECRET_KEY"),
                ];
                let pair = pairs.iter().find_map(|(id, secret)| Some((given(id)?, given(secret)?)));
                pair.map(|(access_key_id, secret_access_key)| S3Credentials {
                    access_key_id,
                    secret_access_key,
                    session_token: given("AWS_SESSION_TOKEN"),
                })
            }
        };
        // Workers have no flags for these.
        let endpoint = self.s3_endpoint.clone().or_else(|| given(ENV_ENDPOINT));
        let region = self.s3_region.clone().or_else(|| given(ENV_REGION));
        Ok(S3Options { endpoint, region, credentials })
    }
}

fn read(file: &Path) -> anyhow::Result<S3Credentials> {
    let shown = file.display();
    let bytes = std::fs::metadata(file).with_context(|| format!("cannot read {shown}"))?.len();
    if bytes > FILE_BYTES_MAX {
        bail!("{shown} has {bytes} bytes, at most {FILE_BYTES_MAX} are read");
    }
    let text = std::fs::read_to_string(file).with_context(|| format!("cannot read {shown}"))?;
    let value = |name: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        pairs.find(|(key, _)| key.trim() == name).map(|(_, value)| value.trim().to_owned())
    };
    let wanted = |name: &str| value(name).with_context(|| format!("{shown} has no line {name} = ..."));
    Ok(S3Credentials {
        access_key_id: wanted("aws_access_key_id")?,
        secret_access_key: wanted("aws_secret_access_key")?,
        session_token: value("aws_session_token"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_is_told_by_its_environment_where_the_bucket_is() {
        let env = |name: &str| match name {
            ENV_ENDPOINT => Some("http://minio:9000".to_owned()),
            ENV_REGION => Some("eu-1".to_owned()),
            _ => None,
        };
        let options = Args::default().options(env).unwrap();
        assert_eq!(options.endpoint.as_deref(), Some("http://minio:9000"));
        assert_eq!(options.region.as_deref(), Some("eu-1"));
        let flag = Args { s3_endpoint: Some("https://other".to_owned()), ..Args::default() };
        assert_eq!(flag.options(env).unwrap().endpoint.as_deref(), Some("https://other"));
    }

    #[test]
    fn credentials_come_from_a_file_or_the_environment() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("credentials");
        std::fs::write(&file, "[default]\naws_access_key_id = file\naws_secret_access_key=a=b \n").unwrap();
        let env = |name: &str| match name {
            "IMPORTER_ACCESS_KEY_ID" => Some("importer".to_owned()),
            "IMPORTER_SECRET_KEY" => Some("secret".to_owned()),
            "AWS_ACCESS_KEY_ID" => Some(String::new()),
            _ => None,
        };
        let args = |s3_credentials| Args { s3_endpoint: None, s3_region: None, s3_credentials };
        let of_file = args(Some(file.clone())).options(env).unwrap().credentials.unwrap();
        assert_eq!((of_file.access_key_id.as_str(), of_file.secret_access_key.as_str()), ("file", "a=b"));
        let of_env = args(None).options(env).unwrap().credentials.unwrap();
        assert_eq!(of_env.access_key_id, "importer");
        assert!(args(None).options(|_| None).unwrap().credentials.is_none());
        std::fs::write(&file, "aws_access_key_id = s3cret").unwrap();
        let error = args(Some(file)).options(env).unwrap_err();
        assert!(error.to_string().contains("aws_secret_access_key") && !error.to_string().contains("s3cret"));
    }
}
