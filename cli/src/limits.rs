//! The option `--limit`, the same for every command that reads images.

use std::str::FromStr;
use std::time::Duration;

use dvcr_converter::limits::Limits;

use crate::size;

/// Bounds for untrusted images.
#[derive(Clone, Debug, Default, clap::Args)]
#[group(skip)]
pub struct Args {
    /// Change a limit for untrusted images; may be repeated.
    ///
    /// Bytes, with K, M, G or T: virtual-size=64T, table-bytes=48M, decoded-bytes=64T, decoder-memory=120M,
    /// output-bytes=64T. Decoded bytes per stored one: expansion-ratio=100000, bzip2-expansion-ratio=2000000,
    /// image-expansion-ratio=25000. Wrappers and archives around an image: chain-depth=2. Seconds, or with m or h:
    /// wall-time=24h.
    #[arg(long = "limit", value_name = "NAME=VALUE,...", value_delimiter = ',')]
    changes: Vec<Change>,
}

impl Args {
    /// The limits with what the user changed.
    pub fn limits(&self) -> Limits {
        let mut limits = Limits::default();
        for Change { name, value } in &self.changes {
            name.apply(*value, &mut limits);
        }
        limits
    }
}

/// One limit with a new value, understood.
#[derive(Clone, Copy, Debug)]
struct Change {
    name: Name,
    value: u64,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Name {
    VirtualSize,
    TableBytes,
    ExpansionRatio,
    Bzip2ExpansionRatio,
    ImageExpansionRatio,
    DecodedBytes,
    DecoderMemory,
    ChainDepth,
    WallTime,
    OutputBytes,
}

impl Name {
    /// The names are stable: scripts have them.
    const ALL: [(&str, Name); 10] = [
        ("virtual-size", Name::VirtualSize),
        ("table-bytes", Name::TableBytes),
        ("expansion-ratio", Name::ExpansionRatio),
        ("bzip2-expansion-ratio", Name::Bzip2ExpansionRatio),
        ("image-expansion-ratio", Name::ImageExpansionRatio),
        ("decoded-bytes", Name::DecodedBytes),
        ("decoder-memory", Name::DecoderMemory),
        ("chain-depth", Name::ChainDepth),
        ("wall-time", Name::WallTime),
        ("output-bytes", Name::OutputBytes),
    ];

    fn parse(self, value: &str) -> Result<u64, String> {
        let number = |text: &str| {
            text.parse::<u64>().map_err(|_| format!("'{text}' is not a whole number from 0 to 2^64 - 1"))
        };
        match self {
            Name::VirtualSize
            | Name::TableBytes
            | Name::DecodedBytes
            | Name::DecoderMemory
            | Name::OutputBytes => size::parse(value),
            Name::ExpansionRatio | Name::Bzip2ExpansionRatio | Name::ImageExpansionRatio => number(value),
            Name::ChainDepth => match number(value)? {
                depth @ 0..=8 => Ok(depth),
                depth => Err(format!("a chain-depth of {depth} is more than 8")),
            },
            Name::WallTime => {
                let (digits, factor) = match value.strip_suffix(['s', 'm', 'h']) {
                    Some(digits) if value.ends_with('m') => (digits, 60),
                    Some(digits) if value.ends_with('h') => (digits, 3600),
                    Some(digits) => (digits, 1),
                    None => (value, 1),
                };
                number(digits)?.checked_mul(factor).ok_or_else(|| format!("'{value}' is too long a time"))
            }
        }
    }

    fn apply(self, value: u64, limits: &mut Limits) {
        match self {
            Name::VirtualSize => limits.virtual_size_max = value,
            Name::TableBytes => limits.table_bytes_max = value,
            Name::ExpansionRatio => limits.expansion_ratio_max = value,
            Name::Bzip2ExpansionRatio => limits.bzip2_expansion_ratio_max = value,
            Name::ImageExpansionRatio => limits.image_expansion_ratio_max = value,
            Name::DecodedBytes => limits.decoded_bytes_max = value,
            Name::DecoderMemory => limits.decoder_memory_bytes_max = value,
            Name::ChainDepth => limits.chain_depth_max = u32::try_from(value).unwrap_or(u32::MAX),
            Name::WallTime => limits.wall_time_max = Duration::from_secs(value),
            Name::OutputBytes => limits.output_bytes_max = value,
        }
    }
}

impl FromStr for Change {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, value) =
            text.split_once('=').ok_or_else(|| format!("'{text}' is not of the form NAME=VALUE"))?;
        let Some((_, known)) = Name::ALL.iter().find(|(known, _)| *known == name) else {
            let names = Name::ALL.map(|(name, _)| name).join(", ");
            return Err(format!("there is no limit '{name}'; there are {names}"));
        };
        Ok(Change { name: *known, value: known.parse(value)? })
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Command {
        #[command(flatten)]
        limits: Args,
    }

    fn limits(args: &[&str]) -> Result<Limits, clap::Error> {
        let args = ["test"].iter().chain(args);
        Command::try_parse_from(args).map(|command| command.limits.limits())
    }

    #[test]
    fn every_limit_has_a_name_and_changes_nothing_else() {
        assert_eq!(limits(&[]).unwrap(), Limits::default());
        let asked = "virtual-size=1T,table-bytes=2M,expansion-ratio=3,bzip2-expansion-ratio=4,image-expansion-ratio=5";
        let more = "decoded-bytes=6K,decoder-memory=7M,chain-depth=8,wall-time=9m,output-bytes=10";
        let expected = Limits {
            virtual_size_max: 1 << 40,
            table_bytes_max: 2 << 20,
            expansion_ratio_max: 3,
            bzip2_expansion_ratio_max: 4,
            image_expansion_ratio_max: 5,
            decoded_bytes_max: 6 << 10,
            decoder_memory_bytes_max: 7 << 20,
            chain_depth_max: 8,
            wall_time_max: Duration::from_secs(540),
            output_bytes_max: 10,
        };
        assert_eq!(limits(&["--limit", asked, "--limit", more]).unwrap(), expected);
        for wrong in
            ["size=1", "virtual-size", "virtual-size=x", "chain-depth=9", "wall-time=1d", "wall-time="]
        {
            assert!(limits(&["--limit", wrong]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn every_limit_is_documented_with_its_default() {
        let docs = include_str!("../../docs/limits.md");
        let help = Args::augment_help();
        for (name, known) in Name::ALL {
            let row = docs.lines().find(|line| line.starts_with(&format!("| `{name}` |"))).unwrap();
            let default = row.split('|').nth(2).unwrap().trim();
            let mut changed = Limits::default();
            known.apply(known.parse(default).unwrap(), &mut changed);
            assert_eq!(changed, Limits::default(), "{name}: {default} is not the default");
            assert!(help.contains(&format!("{name}={default}")), "{name}={default} is not in the help");
        }
    }

    impl Args {
        fn augment_help() -> String {
            let help = <Command as clap::CommandFactory>::command().render_long_help().to_string();
            help.split_whitespace().collect::<Vec<_>>().join(" ")
        }
    }
}
