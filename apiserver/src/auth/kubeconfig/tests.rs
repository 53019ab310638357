use std::os::unix::fs::PermissionsExt;

use super::*;

fn kubeconfig(credential: Credential, namespace: Option<&str>) -> Kubeconfig {
    Kubeconfig {
        cluster: "dvcr".to_owned(),
        server: "https://127.0.0.1:6443".to_owned(),
        authority: "AUTHORITY".to_owned(),
        user: "jane \"x\"".to_owned(),
        credential,
        namespace: namespace.map(str::to_owned),
    }
}

#[test]
fn a_kubeconfig_has_what_kubectl_reads() {
    let identity = Identity { certificate: "CERTIFICATE".to_owned(), key: "KEY".to_owned() };
    assert_eq!(
        kubeconfig(Credential::Certificate(identity), Some("team-a")).render(),
        r#"apiVersion: v1
kind: Config
clusters:
- name: "dvcr"
  cluster:
    server: "https://127.0.0.1:6443"
    certificate-authority-data: QVVUSE9SSVRZ
users:
- name: "jane \"x\""
  user:
    client-certificate-data: Q0VSVElGSUNBVEU=
    client-key-data: S0VZ
contexts:
- name: "jane \"x\"@dvcr"
  context:
    cluster: "dvcr"
    user: "jane \"x\""
    namespace: "team-a"
current-context: "jane \"x\"@dvcr"
"#
    );
    let token = kubeconfig(Credential::Token("secret-token".to_owned()), None);
    let text = token.render();
    assert!(
        text.contains("  user:\n    token: \"secret-token\"\ncontexts:") && !text.contains("namespace:"),
        "{text}"
    );
    assert!(!format!("{token:?}").contains("secret-token"));
}

#[test]
fn a_kubeconfig_is_replaced_whole_and_is_its_owners_alone() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).unwrap();
    // What a crash left is in nobody's way.
    std::fs::write(folder.path().join(".kubeconfig.new"), "half").unwrap();
    let config = kubeconfig(Credential::Token("t".to_owned()), None);
    config.write(&path).unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), config.render());
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
}
