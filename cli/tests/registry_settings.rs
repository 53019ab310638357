//! Where `dvcr registry` takes its settings from, asked of the program itself.
#![allow(clippy::unwrap_used, clippy::panic, reason = "a failing test panics")]

use std::path::Path;
use std::process::{Command, Output};

fn dvcr(args: &[&str], variables: &[(&str, &str)]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_dvcr"));
    command.args(args).env_clear().envs(variables.iter().copied()).output().unwrap()
}

/// The line of a setting, as the program has it.
fn setting(key: &str, args: &[&str], variables: &[(&str, &str)]) -> String {
    let output = dvcr(&[&["registry", "--print-config"], args].concat(), variables);
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{args:?} {variables:?}: {}", String::from_utf8_lossy(&output.stderr));
    let is_it = |line: &&str| line.trim_start_matches('#').starts_with(&format!("{key}:"));
    text.lines().find(is_it).unwrap_or_else(|| panic!("{key} is not in {text}")).to_owned()
}

#[test]
fn a_flag_counts_more_than_the_environment_and_that_more_than_the_file() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("registry.yaml");
    std::fs::write(
        &file,
        "upload-age: 2d\nbearer: true\nhtpasswd: /h\nanonymous-pull: [a, b]\nroot: /file\n",
    )
    .unwrap();
    let file = file.to_str().unwrap();
    let config = [("DVCR_REGISTRY_CONFIG", file)];
    let variable = [config[0], ("DVCR_REGISTRY_UPLOAD_AGE", "3d")];
    assert_eq!(setting("upload-age", &[], &[]), "upload-age: 7d");
    assert_eq!(setting("upload-age", &["--config", file], &[]), "upload-age: 2d");
    assert_eq!(setting("upload-age", &[], &config), "upload-age: 2d");
    assert_eq!(setting("upload-age", &[], &variable), "upload-age: 3d");
    assert_eq!(setting("upload-age", &["--upload-age", "4d"], &variable), "upload-age: 4d");
    // The default, when it is asked for.
    assert_eq!(setting("upload-age", &["--upload-age", "7d"], &variable), "upload-age: 7d");
    assert_eq!(setting("root", &[], &config), "root: /file");
    assert_eq!(setting("bearer", &[], &config), "bearer: true");
    assert_eq!(setting("bearer", &[], &[config[0], ("DVCR_REGISTRY_BEARER", "false")]), "bearer: false");
    // Lists are not put together.
    let text =
        String::from_utf8(dvcr(&["registry", "--print-config", "--anonymous-pull", "c"], &config).stdout);
    assert!(text.unwrap().contains("\nanonymous-pull:\n- c\n"));
}

#[test]
fn every_setting_with_one_value_has_a_variable() {
    let text = String::from_utf8(dvcr(&["registry", "--print-config"], &[]).stdout).unwrap();
    let names = text.split_whitespace().filter_map(|word| word.strip_suffix('.'));
    let names: Vec<_> = names.filter(|word| word.starts_with("DVCR_REGISTRY_")).collect();
    assert!(names.len() > 20, "{names:?}");
    for name in names {
        let key = name.trim_start_matches("DVCR_REGISTRY_").to_lowercase().replace('_', "-");
        let before = setting(&key, &[], &[]);
        let value = match before.rsplit(' ').next().unwrap() {
            "false" => "true",
            value if value.starts_with(|c: char| c.is_ascii_digit()) && value.parse::<u64>().is_err() => "1s",
            _ => "12",
        };
        let value = match key.as_str() {
            "listen" => "127.0.0.1:1",
            "gc-schedule" => "off",
            "scrub-rate" => "1M",
            "external-url" => "http://x",
            "redirect" => "1s",
            _ => value,
        };
        let output = dvcr(&["registry", "--print-config"], &[(name, value)]);
        let after = String::from_utf8(output.stdout).unwrap();
        let line = after.lines().find(|line| line.starts_with(&format!("{key}: "))).unwrap();
        assert!(line.contains(value) && line != before, "{name}={value} gives {line}");
    }
}

#[test]
fn commands_find_the_registry_by_its_settings_and_keep_its_rules() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("root");
    let file = dir.path().join("registry.yaml");
    std::fs::create_dir(&root).unwrap();
    std::fs::write(&file, format!("root: {}\n", root.display())).unwrap();
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    let (root, file) = (text(&root), text(&file));
    let gc = |args: &[&str], variables: &[(&str, &str)]| {
        let output = dvcr(&[&["registry", "gc"], args].concat(), variables);
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    };
    gc(&["--config", &file], &[]);
    gc(&[], &[("DVCR_REGISTRY_CONFIG", &file)]);
    gc(&["--gc-grace", "1s"], &[("DVCR_REGISTRY_ROOT", &root)]);
    let output = dvcr(&["registry", "ls"], &[]);
    assert!(!output.status.success());
    let error = String::from_utf8_lossy(&output.stderr);
    assert!(error.contains("--root") && error.contains("DVCR_REGISTRY_ROOT"), "{error}");
}

#[test]
fn settings_are_shown_also_when_they_go_ill_together_and_the_exit_code_tells() {
    let output = dvcr(&["registry", "--print-config", "--tls-cert", "x"], &[]);
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stdout).contains("tls-cert: x"));
    assert!(String::from_utf8_lossy(&output.stderr).contains("--tls-key"));
}
