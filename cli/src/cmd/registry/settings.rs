//! What `dvcr registry` can be told, and the ways to tell it.
//!
//! ```text
//!  --some-flag  before  DVCR_REGISTRY_SOME_FLAG  before  some-flag: in the file of --config  before  its default
//! ```
//!
//! A field of [`Settings`] is all of these, and its doc comment explains them all. What does not fit into a flag, such as
//! rules, is a section of the file alone: a field with `#[arg(skip)]`, and its text in [`SECTIONS`].

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow, bail, ensure};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Args, Command, FromArgMatches, Id};
use dvcr_registry::{
    Auth, Bearer, BucketSettings, Cache, Collection, Config, Events, ExternalUrl, MirrorTo, OrOff, Pattern,
    Place, Quota, Rules, Schedule, Size, Time, Tls, UpstreamAddress, Webhook,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// Largest file of settings, bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;
/// Width of the text that is printed, characters.
const WIDTH: usize = 100;
const ENV_PREFIX: &str = "DVCR_REGISTRY_";
const ACCESS: &str = "Who may do what";

/// The sections of the file, each with an example that has all of its keys.
const SECTIONS: [(&str, &str); 5] = [
    ("bucket", BucketSettings::EXAMPLE),
    ("mirror", MirrorTo::EXAMPLE),
    ("rules", Rules::EXAMPLE),
    ("cache", Cache::EXAMPLE),
    ("webhooks", Webhook::EXAMPLE),
];

const HEAD: &str = "\
# Settings of dvcr registry, as `dvcr registry --print-config` shows them.
#
# A key is also a flag of the same name. What has a single value can be set by the environment, too.
# A flag counts more than the environment, that more than this file, and this file more than the default.
# A list is taken from one place as a whole. Sizes have K, M, G or T, times s, m, h or d.
# All of this is read at the start; SIGHUP reads the files with secrets and certificates again, not this one.
";

/// All that a registry can be told.
#[derive(Clone, Debug, clap::Args, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields, default)]
#[group(skip)]
pub struct Settings {
    /// Directory that holds the registry's data, or, if `bucket` does, what this replica has for itself; made if it is not
    /// there
    #[arg(long, value_name = "DIR")]
    pub root: Option<PathBuf>,

    /// Say that nobody else serves the bucket: its store then need not be able to decide between several
    #[arg(long)]
    pub single_replica: bool,

    /// Address and port to listen on; port 0 takes a free one, which the log tells
    #[arg(long, value_name = "ADDR", default_value = "127.0.0.1:5000")]
    pub listen: SocketAddr,

    /// When garbage is collected: five fields of cron, in UTC, or `off`
    #[arg(long, value_name = "CRON", default_value = "0 2 * * *")]
    pub gc_schedule: OrOff<Schedule>,

    /// How long a blob may wait for the manifest that refers to it, such as 90s, 30m, 1h
    #[arg(long, value_name = "TIME", default_value = "1h")]
    pub gc_grace: Time,

    /// How long an upload may rest before it is given up, such as 12h, 7d
    #[arg(long, value_name = "TIME", default_value = "7d")]
    pub upload_age: Time,

    /// Files that are removed per second, at most
    #[arg(long, value_name = "N", default_value = "20000")]
    pub gc_rate: NonZeroU32,

    /// Repositories whose manifests may refer to what is not there, such as `mirror/**`; may be given several times
    #[arg(long, value_name = "PATTERN")]
    pub allow_sparse_manifests: Vec<Pattern>,

    /// Bytes per second that are read again in the background to find damage, at most, or `off`
    #[arg(long, value_name = "SIZE", default_value = "8M")]
    pub scrub_rate: OrOff<Size>,

    /// Bytes that all repositories below a prefix may have, as in vi/ns1/=100G, or vi/*/=50G for each name in place of
    /// the star; the longest prefix counts; may be given several times
    #[arg(long, value_name = "PREFIX=SIZE")]
    pub quota: Vec<Quota>,

    /// Free bytes that uploads leave; by default 1 GiB, or a twentieth of the volume if that is less
    #[arg(long, value_name = "SIZE")]
    pub reserve_space: Option<Size>,

    /// Requests per second that one user, or one address where there are no users, may make; no bound by default
    #[arg(long, value_name = "N")]
    pub request_rate: Option<NonZeroU32>,

    /// How long a client may take to send, or to read, the next 16 KiB of a body, such as 30s
    #[arg(long, value_name = "TIME", default_value = "60s")]
    pub idle_timeout: Time,

    /// Send clients that pull a blob to the bucket itself, by a URL that is valid for so long, such as 20m
    #[arg(long, value_name = "TIME")]
    pub redirect: Option<Time>,

    /// Bytes of blobs in the bucket that are kept below --root, as they are pulled again and again, such as 20G
    #[arg(long, value_name = "SIZE")]
    pub read_cache: Option<Size>,

    /// Requests that bring content at a time; others wait 10 s and are then told to come again
    #[arg(long, value_name = "N", default_value = "40")]
    pub uploads_max: NonZeroU32,

    /// Connections at a time; others wait
    #[arg(long, value_name = "N", default_value = "1024")]
    pub connections_max: NonZeroU32,

    /// Registry whose repositories appear below a prefix, fetched when they are wanted, as in
    /// docker.io/=https://registry-1.docker.io; may be given several times. What else can be said of one is in `cache`
    #[arg(long, value_name = "PREFIX=URL")]
    pub upstream: Vec<UpstreamAddress>,

    /// File that is told who did what: JSON lines, appended to (docs/registry-events.md); none by default
    #[arg(long, value_name = "FILE")]
    pub audit_log: Option<PathBuf>,

    /// Serve anybody, on any address
    #[arg(long, help_heading = ACCESS)]
    pub allow_anonymous: bool,

    /// File with the password of the user `admin`, who may do everything
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub admin_password_file: Option<PathBuf>,

    /// File with the password of the user `node-puller`, who may pull from every repository
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub node_puller_password_file: Option<PathBuf>,

    /// PEM file with the public key of tokens: ES256, with their rights inside, as passwords of any other user
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub token_public_key: Option<PathBuf>,

    /// File of users and bcrypt hashes, as `htpasswd -B` writes it; they may do everything
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub htpasswd: Option<PathBuf>,

    /// Repositories that anybody may pull from: `vi/team/disk`, `vi/team/*` or `**`; may be given several times
    #[arg(long, value_name = "PATTERN", help_heading = ACCESS)]
    pub anonymous_pull: Vec<Pattern>,

    /// Offer the Bearer flow too: tokens that are got from /token with a name and a password
    #[arg(long, help_heading = ACCESS)]
    pub bearer: bool,

    /// PEM file with the private key, P-256, that signs these tokens; one is made at start without it
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub bearer_key: Option<PathBuf>,

    /// What clients call the registry, such as https://registry.example; without it, what their Host header says
    #[arg(long, value_name = "URL", help_heading = ACCESS)]
    pub external_url: Option<ExternalUrl>,

    /// Believe a proxy's X-Forwarded-Proto and X-Forwarded-Host
    #[arg(long, help_heading = ACCESS)]
    pub trust_forwarded: bool,

    /// PEM file with the certificate, and those between it and its root
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub tls_cert: Option<PathBuf>,

    /// PEM file with the private key of the certificate
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub tls_key: Option<PathBuf>,

    /// PEM file with roots of clients' certificates; the common name is the user: `admin` may do everything, others pull
    #[arg(long, value_name = "FILE", help_heading = ACCESS)]
    pub client_ca: Option<PathBuf>,

    /// Serve without TLS on an address that is not loopback
    #[arg(long, help_heading = ACCESS)]
    pub plain_http: bool,

    #[arg(skip)]
    pub bucket: Option<BucketSettings>,

    #[arg(skip)]
    pub mirror: Option<MirrorTo>,

    #[arg(skip)]
    pub rules: Rules,

    #[arg(skip)]
    pub cache: Cache,

    #[arg(skip)]
    pub webhooks: Vec<Webhook>,
}

impl Default for Settings {
    fn default() -> Self {
        let command = Self::augment_args(Command::new("dvcr registry").no_binary_name(true));
        let matches = command.get_matches_from::<_, OsString>([]);
        Self::from_arg_matches(&matches).unwrap_or_else(|error| error.exit())
    }
}

/// Settings by flags and by the environment, and where the others are.
#[derive(Clone, Debug)]
pub struct Given(ArgMatches);

/// Where the others are, and what is done with all of them.
#[derive(Debug, clap::Args)]
#[group(skip)]
struct Source {
    /// File of settings (YAML; docs/registry-config.md)
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print all settings as they are together, as a file for --config with explanations, and end
    #[arg(long)]
    print_config: bool,
}

/// Where a command finds a registry and its settings.
#[derive(Clone, Debug, clap::Args)]
pub struct Home {
    /// Directory that holds the registry's data
    #[arg(long, value_name = "DIR")]
    root: Option<PathBuf>,

    /// File of the registry's settings (YAML; docs/registry-config.md); `root` may be in it
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
}

impl Given {
    /// Whether the settings are only to be shown.
    pub fn is_to_print(&self) -> bool {
        self.0.get_flag("print_config")
    }

    /// Reads the file, and puts on it what is given by flags and by the environment.
    ///
    /// # Errors
    /// Tells the place in the file, and what could be there.
    pub fn settle(mut self) -> anyhow::Result<Settings> {
        let mut settings = match self.0.get_one::<PathBuf>("config") {
            Some(file) => Settings::read(file)?,
            None => Settings::default(),
        };
        let is_default = |id: &Id| self.0.value_source(id.as_str()) == Some(ValueSource::DefaultValue);
        let defaults: Vec<Id> = self.0.ids().filter(|id| is_default(id)).cloned().collect();
        for id in defaults {
            self.0.try_clear_id(id.as_str())?;
        }
        settings.update_from_arg_matches_mut(&mut self.0)?;
        Ok(settings)
    }
}

impl Args for Given {
    fn augment_args(command: Command) -> Command {
        let own = Settings::augment_args(Source::augment_args(Command::new("")));
        command.args(own.get_arguments().cloned().map(|arg| match variable(&arg) {
            Some(name) => arg.env(name).hide_env(true),
            None => arg,
        }))
    }

    fn augment_args_for_update(command: Command) -> Command {
        Self::augment_args(command)
    }
}

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        Ok(Self(matches.clone()))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        self.0 = matches.clone();
        Ok(())
    }
}

impl Home {
    /// Reads the settings that the registry itself would have.
    pub fn settings(&self) -> anyhow::Result<Settings> {
        let flags = [("--root", &self.root), ("--config", &self.config)];
        let given = flags
            .into_iter()
            .filter_map(|(flag, value)| Some([flag.into(), value.clone()?.into_os_string()]));
        let command = Given::augment_args(Command::new("dvcr registry").no_binary_name(true));
        Given(command.try_get_matches_from(given.flatten())?).settle()
    }

    /// Returns the directory that has the content.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        self.settings()?.directory()
    }
}

impl Settings {
    fn read(file: &Path) -> anyhow::Result<Self> {
        let name = file.display();
        let mut text = String::new();
        let read = File::open(file).and_then(|file| file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text));
        ensure!(
            read.with_context(|| format!("cannot read {name}"))? as u64 <= FILE_BYTES_MAX,
            "{name} has more than {FILE_BYTES_MAX} bytes"
        );
        // One with comments alone has no value.
        let settings: Option<Self> = serde_saphyr::from_str(&text).map_err(|error| {
            let at = error.location().and_then(|at| usize::try_from(at.line()).ok()?.checked_sub(1));
            let line = at.and_then(|at| text.lines().nth(at)).unwrap_or_default().trim();
            let line: String = line.chars().take(WIDTH).collect();
            anyhow!("{}", error.without_snippet())
                .context(format!("cannot use the settings in {name} because of `{line}`"))
        })?;
        Ok(settings.unwrap_or_default())
    }

    /// Returns the directory.
    pub fn root(&self) -> anyhow::Result<PathBuf> {
        self.root.clone().context("where is the data? Name the directory by --root DIR, DVCR_REGISTRY_ROOT, or `root` in a file for --config")
    }

    /// Returns the directory that has the content.
    ///
    /// # Errors
    /// When a bucket has it.
    pub fn directory(&self) -> anyhow::Result<PathBuf> {
        if let Some(bucket) = &self.bucket {
            bail!(
                "this looks into a directory, and the registry is in the bucket {:?}: ask the one that serves it, as by \
                 `skopeo list-tags`",
                bucket.bucket
            );
        }
        self.root()
    }

    /// Makes the configuration of a registry that serves.
    ///
    /// # Errors
    /// When settings contradict each other, or one misses another.
    pub fn config(self) -> anyhow::Result<Config> {
        self.check()?;
        self.build()
    }

    fn build(self) -> anyhow::Result<Config> {
        let mut config = self.upkeep()?;
        config.uploads_max = usize::try_from(self.uploads_max.get())?;
        config.connections_max = usize::try_from(self.connections_max.get())?;
        config.scrub.rate = self.scrub_rate.on().map(|Size(rate)| rate);
        config.limits.reserve_bytes = self.reserve_space.map(|Size(bytes)| bytes);
        config.limits.request_rate = self.request_rate.map(NonZeroU32::get);
        config.limits.idle_timeout = self.idle_timeout.0;
        config.limits.read_cache_bytes = self.read_cache.map(|Size(bytes)| bytes);
        config.limits.redirect = self.redirect.map(|Time(lasts)| lasts);
        config.auth = self.users().next().is_some().then(|| Auth {
            admin_password: self.admin_password_file.clone(),
            node_puller_password: self.node_puller_password_file.clone(),
            token_key: self.token_public_key.clone(),
            htpasswd: self.htpasswd.clone(),
            anonymous_pull: self.anonymous_pull.clone(),
            bearer: self.bearer.then(|| Bearer {
                key: self.bearer_key.clone(),
                external_url: self.external_url.clone(),
                trust_forwarded: self.trust_forwarded,
            }),
        });
        config.tls =
            self.tls_cert.zip(self.tls_key).map(|(cert, key)| Tls { cert, key, client_ca: self.client_ca });
        config.limits.quotas = self.quota;
        config.cache = self.cache;
        config.cache.upstreams.extend(self.upstream.into_iter().map(Into::into));
        config.mirror = self.mirror;
        config.events = Events { audit_log: self.audit_log, webhooks: self.webhooks };
        Ok(config)
    }

    /// Makes the configuration of one that only works on what is there.
    pub fn upkeep(&self) -> anyhow::Result<Config> {
        let mut config = Config::new(self.root()?);
        config.collection = Collection {
            schedule: self.gc_schedule.clone().on(),
            grace: self.gc_grace.0,
            upload_age: self.upload_age.0,
            removals_per_second: self.gc_rate.get(),
        };
        config.rules = self.rules();
        config.bucket.clone_from(&self.bucket);
        config.single_replica = self.single_replica;
        Ok(config)
    }

    /// Tells where the content of a registry is, by its file of settings, or by its directory.
    ///
    /// # Errors
    /// When the file cannot be used, or names neither a directory nor a bucket.
    pub fn of_place(path: &Path) -> anyhow::Result<Self> {
        match path.is_file() {
            true => Self::read(path),
            false => Ok(Self { root: Some(path.to_owned()), ..Self::default() }),
        }
    }

    /// Tells where the content is.
    pub fn place(self) -> anyhow::Result<Place> {
        let root = match &self.bucket {
            // A bucket's replica has a directory for itself, but nothing in it is content.
            Some(_) => self.root.unwrap_or_default(),
            None => self.root()?,
        };
        let place = Place { root, bucket: self.bucket, single_replica: self.single_replica };
        place.absolute().context("cannot tell where this directory is")
    }

    /// Returns the rules, the patterns of sparse manifests among them.
    pub fn rules(&self) -> Rules {
        Rules { sparse_manifests: self.allow_sparse_manifests.clone(), ..self.rules.clone() }
    }

    /// The settings that tell who may do what, as far as they are set.
    fn users(&self) -> impl Iterator<Item = &'static str> {
        [
            ("admin-password-file", self.admin_password_file.is_some()),
            ("node-puller-password-file", self.node_puller_password_file.is_some()),
            ("token-public-key", self.token_public_key.is_some()),
            ("htpasswd", self.htpasswd.is_some()),
            ("anonymous-pull", !self.anonymous_pull.is_empty()),
            ("client-ca", self.client_ca.is_some()),
        ]
        .into_iter()
        .filter_map(|(name, is_set)| is_set.then_some(name))
    }

    /// Looks for settings that go ill together, wherever they come from.
    pub fn check(&self) -> anyhow::Result<()> {
        let has_users = self.users().next().is_some();
        let has_cert = self.tls_cert.is_some();
        if let Some(user) = self.users().next().filter(|_| self.allow_anonymous) {
            bail!("--allow-anonymous lets anybody do everything, and --{user} does not: set one of them");
        }
        for (name, is_set, other, is_met) in [
            ("bearer", self.bearer, "users, such as those of --htpasswd", has_users),
            ("bearer-key", self.bearer_key.is_some(), "--bearer", self.bearer),
            ("external-url", self.external_url.is_some(), "--bearer", self.bearer),
            ("trust-forwarded", self.trust_forwarded, "--bearer", self.bearer),
            ("tls-cert", has_cert, "--tls-key", self.tls_key.is_some()),
            ("tls-key", self.tls_key.is_some(), "--tls-cert", has_cert),
            ("client-ca", self.client_ca.is_some(), "--tls-cert", has_cert),
        ] {
            ensure!(is_met || !is_set, "--{name} does nothing without {other}: set both, or neither");
        }
        ensure!(
            !(self.plain_http && has_cert),
            "--plain-http is without TLS, --tls-cert with it: set one of them"
        );
        if let Some(bucket) = &self.bucket {
            bucket.check().map_err(|why| anyhow!("in `bucket`: {why}"))?;
        }
        if let Some(mirror) = &self.mirror {
            mirror.check().map_err(|why| anyhow!("in `mirror`: {why}"))?;
        }
        for (name, is_set) in [("single-replica", self.single_replica), ("redirect", self.redirect.is_some())]
        {
            ensure!(
                self.bucket.is_some() || !is_set,
                "--{name} does nothing without a section `bucket` in the file of --config"
            );
        }
        ensure!(
            self.redirect.is_none_or(|time| !time.0.is_zero()),
            "a --redirect of 0 gives URLs that nobody can use; write a time such as 20m"
        );
        ensure!(self.scrub_rate != OrOff::On(Size(0)), "a --scrub-rate of 0 never ends; write `off`");
        ensure!(
            !self.idle_timeout.0.is_zero(),
            "an --idle-timeout of 0 cuts everybody off; write a time such as 60s"
        );
        let listen = self.listen;
        if !listen.ip().is_loopback() {
            ensure!(
                has_users || self.allow_anonymous,
                "{listen} is not a loopback address: name the users with --admin-password-file FILE, \
                 --htpasswd FILE or others of --help, or serve anybody with --allow-anonymous"
            );
            ensure!(
                has_cert || self.plain_http,
                "{listen} is not a loopback address: give a certificate with --tls-cert FILE and --tls-key FILE, \
                 or serve without TLS, for a proxy that has it, with --plain-http"
            );
        }
        Ok(())
    }

    /// Shows the settings as a file that gives them again, with explanations.
    pub fn print(&self) -> anyhow::Result<String> {
        let (values, defaults) = (values(self)?, values(&Self::default())?);
        let mut out = HEAD.to_owned();
        for arg in Self::augment_args(Command::new("")).get_arguments() {
            let Some(key) = arg.get_long() else { continue };
            let help = arg.get_long_help().or(arg.get_help()).map(ToString::to_string).unwrap_or_default();
            write!(out, "\n{}", comment(&(help.replace('\n', " ") + ".")))?;
            let default = match defaults.get(key) {
                Some(Value::Null) | None => None,
                Some(Value::Array(_)) => Some("none".to_owned()),
                Some(Value::String(text)) => Some(text.clone()),
                Some(default) => Some(default.to_string()),
            };
            let facts = [("Environment", variable(arg)), ("Default", default)];
            let facts: Vec<_> = facts
                .iter()
                .filter_map(|(name, fact)| Some(format!("{name}: {}.", fact.as_ref()?)))
                .collect();
            out.push_str(&comment(&facts.join(" ")));
            match values.get(key) {
                Some(Value::Null) | None => writeln!(out, "#{key}:")?,
                Some(value) => out.push_str(&yaml(key, value)?),
            }
        }
        for (key, example) in SECTIONS {
            out.push('\n');
            for line in example.trim().lines() {
                writeln!(out, "{}{line}", if line.starts_with('#') { "" } else { "#" })?;
            }
            if values.get(key) != defaults.get(key) {
                out.push_str(&yaml(key, values.get(key).unwrap_or(&Value::Null))?);
            }
        }
        Ok(out)
    }
}

/// The variable that a setting has: whatever has a single value.
fn variable(arg: &Arg) -> Option<String> {
    let name = arg.get_long().filter(|name| *name != "print-config")?;
    let is_single = matches!(arg.get_action(), ArgAction::Set | ArgAction::SetTrue);
    is_single.then(|| ENV_PREFIX.to_owned() + &name.to_uppercase().replace('-', "_"))
}

fn values(settings: &Settings) -> anyhow::Result<BTreeMap<String, Value>> {
    Ok(serde_json::from_value(serde_json::to_value(settings)?)?)
}

/// A key and its value as YAML, without what is not set.
fn yaml(key: &str, value: &Value) -> anyhow::Result<String> {
    fn is_set(value: &Value) -> bool {
        !value.is_null()
    }
    fn prune(value: &Value) -> Value {
        match value {
            Value::Object(fields) => fields
                .iter()
                .filter(|(_, value)| is_set(value))
                .map(|(key, value)| (key.clone(), prune(value)))
                .collect(),
            Value::Array(items) => items.iter().map(prune).collect(),
            other => other.clone(),
        }
    }
    Ok(serde_saphyr::to_string(&BTreeMap::from([(key, prune(value))]))?)
}

/// A text as lines of comments.
fn comment(text: &str) -> String {
    let mut out = String::from("#");
    let mut width = 1;
    for word in text.split_whitespace() {
        let more = word.chars().count() + 1;
        if width + more > WIDTH {
            out.push_str("\n#");
            width = 1;
        }
        out.push(' ');
        out.push_str(word);
        width += more;
    }
    out.push('\n');
    out
}

#[cfg(test)]
mod tests;
