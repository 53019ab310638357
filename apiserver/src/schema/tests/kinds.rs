use serde_json::json;

use super::texts;
use crate::schema::{ListType, Type, core, core_kinds};

#[test]
fn all_core_kinds_have_a_schema() {
    let kinds: Vec<String> = core_kinds().map(|(version, kind)| format!("{version} {kind}")).collect();
    assert_eq!(
        kinds,
        [
            "apiextensions.k8s.io/v1 CustomResourceDefinition",
            "authentication.k8s.io/v1 SelfSubjectReview",
            "authentication.k8s.io/v1 TokenRequest",
            "authentication.k8s.io/v1 TokenReview",
            "authorization.k8s.io/v1 LocalSubjectAccessReview",
            "authorization.k8s.io/v1 SelfSubjectAccessReview",
            "authorization.k8s.io/v1 SelfSubjectRulesReview",
            "authorization.k8s.io/v1 SubjectAccessReview",
            "coordination.k8s.io/v1 Lease",
            "events.k8s.io/v1 Event",
            "networking.k8s.io/v1 Ingress",
            "networking.k8s.io/v1 NetworkPolicy",
            "rbac.authorization.k8s.io/v1 ClusterRole",
            "rbac.authorization.k8s.io/v1 ClusterRoleBinding",
            "rbac.authorization.k8s.io/v1 Role",
            "rbac.authorization.k8s.io/v1 RoleBinding",
            "storage.k8s.io/v1 StorageClass",
            "v1 ConfigMap",
            "v1 Event",
            "v1 Namespace",
            "v1 Node",
            "v1 PersistentVolume",
            "v1 PersistentVolumeClaim",
            "v1 Pod",
            "v1 ResourceQuota",
            "v1 Secret",
            "v1 Service",
            "v1 ServiceAccount",
        ]
    );
    for (version, kind) in core_kinds() {
        let root = core(version, kind).unwrap().root();
        assert!(root.properties.contains_key("metadata"), "{version} {kind}");
        assert!(root.properties["metadata"].properties.contains_key("managedFields"), "{version} {kind}");
    }
    assert!(core("v1", "Nothing").is_none());
}

#[test]
fn a_pod_is_filled_pruned_merged_and_validated() {
    let pod = core("v1", "Pod").unwrap();
    let mut object = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p", "creationTimestamp": null, "labels": {"a": "b"}},
        "spec": {
            "containers": [{
                "name": "c", "image": "i", "ports": [{"containerPort": 80}], "typo": 1,
                "resources": {"requests": {"cpu": 1, "memory": "1Gi"}},
                "livenessProbe": {"httpGet": {"port": "http"}},
            }],
            "volumes": [{"name": "v", "emptyDir": {}}],
            "nodeSelector": null,
        },
        "status": {},
    });
    assert_eq!(pod.prune(&mut object), ["unknown field \"spec.containers[0].typo\""]);
    pod.default(&mut object);
    assert_eq!(object["spec"]["containers"][0]["ports"][0], json!({"containerPort": 80, "protocol": "TCP"}));
    assert_eq!(object["metadata"], json!({"name": "p", "labels": {"a": "b"}}));
    assert!(object["spec"].get("nodeSelector").is_none());
    assert_eq!(pod.validate(&object, None), []);
    object["spec"]["containers"][0]["resources"]["requests"]["memory"] = json!("1GiB");
    object["spec"]["containers"][0]["image"] = json!(1);
    object["spec"]["volumes"] = json!([{"name": "v"}, {"name": "v"}]);
    assert_eq!(
        texts(&pod.validate(&object, None)),
        [
            "spec.containers[0].image: Invalid value: \"integer\": \
         spec.containers[0].image in body must be of type string: \"integer\"",
            "spec.containers[0].resources.requests.memory: Invalid value: \"1GiB\": quantities must match the regular \
         expression '^([+-]?[0-9.]+)([eEinumkKMGTP]*[-+]?[0-9]*)$'",
            "spec.volumes[1]: Duplicate value: {\"name\":\"v\"}",
        ]
    );
    assert_eq!(texts(&pod.validate(&json!({"spec": {}}), None)), ["spec.containers: Required value"]);
    let spec = &pod.root().properties["spec"];
    let containers = &spec.properties["containers"];
    assert_eq!(containers.list, ListType::Map(vec!["name".to_owned()]));
    assert!(containers.patch.merges && containers.patch.merge_key.as_deref() == Some("name"));
    assert!(spec.properties["volumes"].patch.retains_keys);
    assert!(spec.properties["nodeSelector"].is_atomic);
    let ports = &containers.items.as_ref().unwrap().properties["ports"];
    assert_eq!(ports.list, ListType::Map(vec!["containerPort".to_owned(), "protocol".to_owned()]));
    let env = &containers.items.as_ref().unwrap().properties["env"];
    assert!(env.patch.merges && env.patch.merge_key.as_deref() == Some("name"));
    assert_eq!(pod.root().properties["metadata"].properties["finalizers"].list, ListType::Set);
}

#[test]
fn a_definition_holds_any_schema() {
    let definition = core("apiextensions.k8s.io/v1", "CustomResourceDefinition").unwrap();
    let mut object = json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "a.b"},
        "spec": {"group": "b", "scope": "Namespaced", "names": {"plural": "a", "kind": "A"}, "versions": [{
            "name": "v1", "served": true, "storage": true, "subresources": {"status": {}},
            "schema": {"openAPIV3Schema": {"type": "object", "properties": {
                "spec": {"type": "object", "additionalProperties": true, "default": {"any": ["thing"]}},
                "list": {"type": "array", "items": {"type": "object", "properties": {"deep": {"type": "string"}}}},
            }}},
        }]},
    });
    let before = object.clone();
    assert_eq!(definition.prune(&mut object), [""; 0]);
    definition.default(&mut object);
    assert_eq!(object, before);
    assert_eq!(definition.validate(&object, None), []);
}

#[test]
fn what_clients_write_empty_is_taken() {
    let object = json!({"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest",
        "metadata": {"creationTimestamp": null}, "spec": {"audiences": null, "expirationSeconds": 600, "boundObjectRef": null},
        "status": {"token": "", "expirationTimestamp": null}});
    let schema = core("authentication.k8s.io/v1", "TokenRequest").unwrap();
    let mut object = object;
    schema.default(&mut object);
    assert_eq!(schema.validate(&object, None), []);
    let binding = core("rbac.authorization.k8s.io/v1", "RoleBinding").unwrap();
    let object = json!({"metadata": {"name": "b"}, "roleRef": {"kind": "Role", "name": "r"},
        "subjects": [{"kind": "User", "name": "u"}]});
    assert_eq!(binding.validate(&object, None), []);
    assert_eq!(binding.root().properties["subjects"].r#type, Type::Array);
}
