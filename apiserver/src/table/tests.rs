use serde_json::json;

use super::*;
use crate::status::Reason;

const TABLE: Target = Target { group: "meta.k8s.io", version: "v1", kind: "Table" };
const PARTIAL: Target = Target { kind: "PartialObjectMetadata", ..TABLE };
const PARTIAL_LIST: Target = Target { kind: "PartialObjectMetadataList", ..TABLE };

fn options() -> TableOptions {
    TableOptions {
        include: Include::default(),
        has_headers: true,
        now: "2026-01-01T00:05:12Z".parse().unwrap(),
    }
}

/// The rows of a list of these objects.
fn rows(columns: &Columns, objects: &[Object]) -> Vec<Value> {
    let table = list_as(TABLE, objects, &Object::new(), columns, &options()).unwrap();
    table["rows"].as_array().unwrap().clone()
}

fn object(value: Value) -> Object {
    match value {
        Value::Object(object) => object,
        other => panic!("{other} is no object"),
    }
}

/// The object with the metadata that all of them have here.
fn named(mut value: Value) -> Object {
    let metadata = json!({"name": "a", "namespace": "n", "creationTimestamp": "2026-01-01T00:00:00Z"});
    for (key, field) in object(metadata) {
        if value["metadata"].get(&key).is_none() {
            value["metadata"][key] = field;
        }
    }
    object(value)
}

fn cells(group: &str, kind: &str, value: Value) -> Value {
    let columns = Columns::of_kind(group, kind);
    let row = rows(&columns, &[named(value)]).remove(0);
    assert_eq!(
        row["cells"].as_array().unwrap().len(),
        columns.definitions().as_array().unwrap().len(),
        "{kind}"
    );
    row["cells"].clone()
}

#[test]
fn a_custom_resource_is_shown_by_its_columns() {
    let columns = json!([
        {"name": "Phase", "type": "string", "jsonPath": ".status.phase"},
        {"name": "Size", "type": "integer", "format": "int64", "jsonPath": ".spec.size", "priority": 1, "description": "how large"},
        {"name": "Part", "type": "number", "jsonPath": ".status.part"},
        {"name": "On", "type": "boolean", "jsonPath": ".spec.on"},
        {"name": "Since", "type": "date", "jsonPath": ".status.since"},
        {"name": "Ready", "type": "string", "jsonPath": ".status.conditions[?(@.type==\"Ready\")].status"},
        {"name": "All", "type": "string", "jsonPath": ".status.map"},
        {"name": "None", "type": "string", "jsonPath": ".status.none"},
        {"name": "Wrong", "type": "integer", "jsonPath": ".status.phase"},
    ]);
    let columns = Columns::of_custom(columns.as_array().unwrap());
    let objects = [
        named(
            json!({"spec": {"size": 7, "on": true}, "status": {"phase": "Up", "part": 0.5, "since": "2026-01-01T00:03:12Z",
            "conditions": [{"type": "Ready", "status": "True"}], "map": {"b": "<", "a": 1.5}}}),
        ),
        named(json!({"metadata": {"name": "b"}, "status": {"phase": 3, "part": 2, "since": "never"}})),
    ];
    let metadata =
        object(json!({"resourceVersion": "9", "continue": "c", "remainingItemCount": 2, "other": 1}));
    let table = Value::Object(list_as(TABLE, &objects, &metadata, &columns, &options()).unwrap());
    assert_eq!((&table["kind"], &table["apiVersion"]), (&json!("Table"), &json!("meta.k8s.io/v1")));
    assert_eq!(table["metadata"], json!({"resourceVersion": "9", "continue": "c", "remainingItemCount": 2}));
    let definitions = &table["columnDefinitions"];
    assert_eq!((&definitions[0]["name"], &definitions[0]["format"]), (&json!("Name"), &json!("name")));
    assert_eq!(
        definitions[2],
        json!({"name": "Size", "type": "integer", "format": "int64", "description": "how large", "priority": 1})
    );
    assert_eq!(
        definitions[1]["description"],
        "Custom resource definition column (in JSONPath format): .status.phase"
    );
    let rows = table["rows"].as_array().unwrap();
    assert_eq!(
        rows[0]["cells"],
        json!(["a", "Up", 7, 0.5, true, "2m", "True", "{\"a\":1.5,\"b\":\"\\u003c\"}", null, null])
    );
    assert_eq!(rows[1]["cells"], json!(["b", "3", null, 2, null, "<invalid>", null, null, null, 3]));
    assert_eq!(rows[0]["object"]["kind"], "PartialObjectMetadata");
    assert_eq!(rows[0]["object"]["metadata"]["name"], "a");
    assert!(rows[0]["object"].get("spec").is_none());
}

#[test]
fn without_columns_the_age_is_shown_and_a_path_that_is_none_ends_them() {
    let table = |columns: Value| {
        let columns = Columns::of_custom(columns.as_array().unwrap());
        Value::Object(object_as(TABLE, &named(json!({})), &columns, &options()).unwrap())
    };
    let table_of_none = table(json!([]));
    assert_eq!(table_of_none["columnDefinitions"][1]["name"], "Age");
    assert_eq!(table_of_none["rows"][0]["cells"], json!(["a", "5m12s"]));
    let bad = json!([{"name": "A", "type": "string", "jsonPath": ".a"}, {"name": "B", "type": "string", "jsonPath": ".b["},
        {"name": "C", "type": "string", "jsonPath": ".c"}]);
    assert_eq!(table(bad)["rows"][0]["cells"], json!(["a", null]));
}

#[test]
fn all_columns_of_a_row_share_what_may_be_visited() {
    let column = json!({"name": "A", "type": "string", "jsonPath": "..none"});
    let mut columns = vec![column; 1000];
    columns.push(json!({"name": "B", "type": "string", "jsonPath": ".metadata.name"}));
    let wide = named(json!({"spec": vec![1; 1000]}));
    let row = rows(&Columns::of_custom(&columns), std::slice::from_ref(&wide)).remove(0);
    assert_eq!(row["cells"].as_array().unwrap().last(), Some(&Value::Null));
    let row = rows(&Columns::of_custom(&columns[999..]), &[wide]).remove(0);
    assert_eq!(row["cells"], json!(["a", null, "a"]));
}

#[test]
fn columns_are_refused_with_the_texts_of_kubernetes() {
    let columns = json!([
        {"name": "A", "type": "string", "jsonPath": ".a", "format": "date-time"},
        {"type": "text", "jsonPath": "a", "format": "f"},
        {"name": "C"},
    ]);
    let checked = Columns::check(columns.as_array().unwrap(), "columns");
    let errors: Vec<_> = checked.iter().map(ToString::to_string).collect();
    let reasons = ["Required", "Invalid", "Invalid", "Invalid", "Required", "Required"];
    let told: Vec<_> = checked.iter().map(|error| error.reason.as_str()).collect();
    assert_eq!(told, reasons.map(|reason| format!("FieldValue{reason}")));
    assert_eq!(
        errors,
        [
            "columns[1].name: Required value",
            "columns[1].type: Invalid value: \"text\": must be one of boolean,date,integer,number,string",
            "columns[1].format: Invalid value: \"f\": must be one of byte,date,date-time,double,float,int32,int64,password",
            "columns[1].JSONPath: Invalid value: \"a\": must be a simple json path starting with .",
            "columns[2].type: Required value: must be one of boolean,date,integer,number,string",
            "columns[2].JSONPath: Required value",
        ]
    );
}

#[test]
fn a_row_carries_of_its_object_what_is_asked_for() {
    let columns = Columns::of_kind("", "ConfigMap");
    let map = named(json!({"kind": "ConfigMap", "data": {"a": "b"}}));
    let with = |include| {
        let options = TableOptions { include, has_headers: false, ..options() };
        let target = Target { version: "v1beta1", ..TABLE };
        Value::Object(object_as(target, &map, &columns, &options).unwrap())
    };
    assert_eq!(with(Include::None)["rows"][0]["object"], Value::Null);
    assert_eq!(with(Include::None)["columnDefinitions"], Value::Null);
    assert_eq!(with(Include::Metadata)["rows"][0]["object"]["apiVersion"], "meta.k8s.io/v1beta1");
    assert_eq!(with(Include::Object)["rows"][0]["object"], Value::Object(map.clone()));
    assert_eq!(Include::parse(""), Ok(Include::Metadata));
    assert_eq!(Include::parse("Object"), Ok(Include::Object));
    assert_eq!(Include::parse("None"), Ok(Include::None));
    let error = Include::parse("x").unwrap_err();
    assert_eq!(error.reason, Reason::BadRequest);
    assert_eq!(
        error.message,
        "Unable to convert to Table as requested: includeObject: Invalid value: \"x\": must be 'Metadata', 'Object', 'None', or empty"
    );
}

#[test]
fn objects_are_shown_by_their_metadata_alone() {
    let columns = Columns::of_kind("", "ConfigMap");
    let map = named(json!({"kind": "ConfigMap", "metadata": {"resourceVersion": "7"}, "data": {"a": "b"}}));
    let one = Value::Object(object_as(PARTIAL, &map, &columns, &options()).unwrap());
    assert_eq!(one["apiVersion"], "meta.k8s.io/v1");
    assert_eq!((&one["kind"], &one["metadata"]), (&json!("PartialObjectMetadata"), &map["metadata"]));
    assert!(one.get("data").is_none());
    let metadata = object(json!({"resourceVersion": "3"}));
    let list = list_as(PARTIAL_LIST, std::slice::from_ref(&map), &metadata, &columns, &options()).unwrap();
    let list = Value::Object(list);
    assert_eq!(
        (&list["kind"], &list["metadata"]),
        (&json!("PartialObjectMetadataList"), &json!({"resourceVersion": "3"}))
    );
    assert_eq!(list["items"], json!([one]));
    let table = object_as(TABLE, &map, &columns, &options()).unwrap();
    assert_eq!(table["metadata"], json!({"resourceVersion": "7"}));
    let error = object_as(PARTIAL_LIST, &map, &columns, &options()).unwrap_err();
    assert_eq!(error.reason, Reason::NotAcceptable);
    assert_eq!(
        error.message,
        "you requested PartialObjectMetadataList, but the requested object is not a list (ConfigMap)"
    );
    let error = list_as(PARTIAL, &[map], &metadata, &columns, &options()).unwrap_err();
    assert_eq!(error.message, "you requested PartialObjectMetadata, but the requested object is a list");
}

#[test]
fn the_small_kinds_are_shown_as_kubectl_shows_them() {
    let rbac = "rbac.authorization.k8s.io";
    for (group, kind, value, expected) in [
        ("", "Namespace", json!({"status": {"phase": "Active"}}), json!(["a", "Active", "5m12s"])),
        (
            "",
            "Secret",
            json!({"type": "Opaque", "data": {"a": "", "b": ""}}),
            json!(["a", "Opaque", 2, "5m12s"]),
        ),
        ("", "ConfigMap", json!({"data": {"a": ""}, "binaryData": {"b": ""}}), json!(["a", 2, "5m12s"])),
        ("", "ServiceAccount", json!({}), json!(["a", "5m12s"])),
        (
            "coordination.k8s.io",
            "Lease",
            json!({"spec": {"holderIdentity": "h"}}),
            json!(["a", "h", "5m12s"]),
        ),
        (rbac, "Role", json!({}), json!(["a", "2026-01-01T00:00:00Z"])),
        ("apiextensions.k8s.io", "CustomResourceDefinition", json!({}), json!(["a", "2026-01-01T00:00:00Z"])),
        (
            rbac,
            "RoleBinding",
            json!({"roleRef": {"kind": "Role", "name": "r"}, "subjects": [{"kind": "User", "name": "u"}, {"kind": "Group", "name": "g"},
                {"kind": "ServiceAccount", "namespace": "n", "name": "s"}, {"kind": "User", "name": "v"}]}),
            json!(["a", "Role/r", "5m12s", "u, v", "g", "n/s"]),
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"podSelector": {"matchLabels": {"b": "c"}, "matchExpressions": [{"key": "a", "operator": "Exists"}]}}}),
            json!(["a", "a,b=c", "5m12s"]),
        ),
        (
            "networking.k8s.io",
            "NetworkPolicy",
            json!({"spec": {"podSelector": {}}}),
            json!(["a", "<none>", "5m12s"]),
        ),
        (
            "networking.k8s.io",
            "Ingress",
            json!({"spec": {"tls": [{}], "rules": [{"host": "a"}, {"host": "b"}, {"host": "c"}, {"host": "d"}]},
                "status": {"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}, {"hostname": "1.host"}]}}}),
            json!(["a", "<none>", "a,b,c + 1 more...", "1.host,2.2.2.2", "80, 443", "5m12s"]),
        ),
        (
            "networking.k8s.io",
            "Ingress",
            json!({"spec": {"ingressClassName": "i"}}),
            json!(["a", "i", "*", "", "80", "5m12s"]),
        ),
        (
            "",
            "ResourceQuota",
            json!({"status": {"hard": {"pods": "10", "requests.storage": "10240Mi", "limits.cpu": "2"}, "used": {"pods": "3", "requests.storage": "1.5Gi"}}}),
            json!(["a", "pods: 3/10, requests.storage: 1536Mi/10Gi", "limits.cpu: 0/2", "5m12s"]),
        ),
    ] {
        assert_eq!(cells(group, kind, value), expected, "{kind}");
    }
}

#[test]
fn services_are_shown_as_kubectl_shows_them() {
    for (value, expected) in [
        (
            json!({"spec": {"type": "ClusterIP", "clusterIPs": ["10.0.0.1"], "ports": [{"port": 80, "protocol": "TCP"}], "selector": {"b": "c", "a": "b"}}}),
            json!(["a", "ClusterIP", "10.0.0.1", "<none>", "80/TCP", "5m12s", "a=b,b=c"]),
        ),
        (
            json!({"spec": {"type": "NodePort", "clusterIP": "10.0.0.2", "externalIPs": ["1.1.1.1"], "ports": [{"port": 80, "nodePort": 30080, "protocol": "TCP"}, {"port": 53, "protocol": "UDP"}]}}),
            json!(["a", "NodePort", "10.0.0.2", "1.1.1.1", "80:30080/TCP,53/UDP", "5m12s", "<none>"]),
        ),
        (
            json!({"spec": {"type": "LoadBalancer"}}),
            json!(["a", "LoadBalancer", "<none>", "<pending>", "<none>", "5m12s", "<none>"]),
        ),
        (
            json!({"spec": {"type": "LoadBalancer", "externalIPs": ["3.3.3.3"]}, "status": {"loadBalancer": {"ingress": [{"ip": "2.2.2.2"}]}}}),
            json!(["a", "LoadBalancer", "<none>", "2.2.2.2,3.3.3.3", "<none>", "5m12s", "<none>"]),
        ),
        (
            json!({"spec": {"type": "ExternalName", "externalName": "example.com"}}),
            json!(["a", "ExternalName", "<none>", "example.com", "<none>", "5m12s", "<none>"]),
        ),
    ] {
        assert_eq!(cells("", "Service", value), expected);
    }
}

#[test]
fn volumes_and_classes_are_shown_as_kubectl_shows_them() {
    assert_eq!(
        cells(
            "",
            "PersistentVolumeClaim",
            json!({"spec": {"volumeName": "v", "storageClassName": "local", "volumeMode": "Block", "resources": {"requests": {"storage": "1Gi"}}},
            "status": {"phase": "Bound", "capacity": {"storage": "2048Mi"}, "accessModes": ["ReadWriteMany", "ReadWriteOnce", "ReadWriteOnce"]}})
        ),
        json!(["a", "Bound", "v", "2Gi", "RWO,RWX", "local", "<unset>", "5m12s", "Block"])
    );
    assert_eq!(
        cells(
            "",
            "PersistentVolumeClaim",
            json!({"metadata": {"deletionTimestamp": "2026-01-01T00:00:00Z"}, "spec": {}})
        ),
        json!(["a", "Terminating", "", "", "", "", "<unset>", "5m12s", "<unset>"])
    );
    assert_eq!(
        cells(
            "",
            "PersistentVolume",
            json!({"spec": {"capacity": {"storage": "1000Mi"}, "accessModes": ["ReadWriteOncePod", "ReadOnlyMany"], "persistentVolumeReclaimPolicy": "Delete",
            "claimRef": {"namespace": "n", "name": "c"}, "storageClassName": "local", "volumeMode": "Filesystem"}, "status": {"phase": "Bound"}})
        ),
        json!([
            "a",
            "1000Mi",
            "ROX,RWOP",
            "Delete",
            "Bound",
            "n/c",
            "local",
            "<unset>",
            "",
            "5m12s",
            "Filesystem"
        ])
    );
    let class = |name: &str, created: &str, is_default: bool| {
        named(json!({"metadata": {"name": name, "creationTimestamp": created,
            "annotations": {"storageclass.kubernetes.io/is-default-class": is_default.to_string()}}, "provisioner": "p"}))
    };
    let (old, new) = ("2025-12-31T00:05:12Z", "2026-01-01T00:05:02Z");
    let classes =
        [class("c", new, true), class("b", new, true), class("a", old, true), class("d", new, false)];
    let columns = Columns::of_kind("storage.k8s.io", "StorageClass");
    let rows: Vec<_> = rows(&columns, &classes).iter().map(|row| row["cells"].clone()).collect();
    assert_eq!(rows[1], json!(["b (default)", "p", "Delete", "Immediate", false, "10s"]));
    let names: Vec<_> = rows.iter().map(|cells| cells[0].clone()).collect();
    assert_eq!(names, ["c", "b (default)", "a", "d"]);
    assert_eq!(rows[2][5], "24h");
    // One that was asked for by its name is not set beside others.
    let one = object_as(TABLE, &classes[1], &columns, &options()).unwrap();
    assert_eq!(one["rows"][0]["cells"][0], "b");
}

#[test]
fn nodes_and_events_are_shown_as_kubectl_shows_them() {
    assert_eq!(
        cells(
            "",
            "Node",
            json!({"metadata": {"labels": {"node-role.kubernetes.io/worker": "", "kubernetes.io/role": "control", "node-role.kubernetes.io/": ""}},
            "spec": {"unschedulable": true}, "status": {"conditions": [{"type": "Ready", "status": "True"}],
                "addresses": [{"type": "Hostname", "address": "h"}, {"type": "InternalIP", "address": "10.0.0.1"}],
                "nodeInfo": {"kubeletVersion": "v1", "kernelVersion": "6.1", "architecture": "amd64", "osImage": ""}}})
        ),
        json!([
            "a",
            "Ready,SchedulingDisabled",
            "control,worker",
            "5m12s",
            "v1",
            "10.0.0.1",
            "<none>",
            "<unknown>",
            "6.1 (amd64)",
            "<unknown>"
        ])
    );
    assert_eq!(cells("", "Node", json!({}))[1], "Unknown");
    assert_eq!(
        cells("", "Node", json!({"status": {"conditions": [{"type": "Ready", "status": "Unknown"}]}}))[1],
        "NotReady"
    );
    assert_eq!(
        cells(
            "",
            "Event",
            json!({"type": "Warning", "reason": "Failed", "involvedObject": {"kind": "Pod", "name": "p", "fieldPath": "spec"}, "message": " m\n",
            "source": {"component": "c", "host": "h"}, "firstTimestamp": "2026-01-01T00:00:12Z", "lastTimestamp": "2026-01-01T00:05:00Z", "count": 3})
        ),
        json!(["12s", "Warning", "Failed", "pod/p", "spec", "c, h", "m", "5m", 3, "a"])
    );
    assert_eq!(
        cells(
            "",
            "Event",
            json!({"eventTime": "2026-01-01T00:05:02.123456Z", "reportingComponent": "c", "reportingInstance": "i", "involvedObject": {"kind": "Node"},
            "series": {"count": 5, "lastObservedTime": "2026-01-01T00:05:11.000000Z"}, "firstTimestamp": null, "lastTimestamp": null})
        ),
        json!(["1s", "", "", "node", "", "c, i", "", "9s", 5, "a"])
    );
}

/// Cells of a Pod with this `status` beside two containers and two init containers, of which the second goes
/// on beside them.
fn pod(metadata: Value, status: Value) -> (String, String, String) {
    let spec = json!({"containers": [{"name": "x"}, {"name": "y"}], "initContainers": [{"name": "i"}, {"name": "s", "restartPolicy": "Always"}]});
    let cells = cells("", "Pod", json!({"metadata": metadata, "spec": spec, "status": status}));
    let cell = |i: usize| cells[i].as_str().unwrap().to_owned();
    (cell(1), cell(2), cell(3))
}

#[test]
fn every_case_of_a_pod_is_told_in_its_word() {
    let running = |name: &str| json!({"name": name, "ready": true, "started": true, "restartCount": 0, "state": {"running": {}}});
    let ended = |name: &str, code: i64, reason: &str| json!({"name": name, "state": {"terminated": {"exitCode": code, "reason": reason}}});
    let waiting = |name: &str, reason: &str| json!({"name": name, "state": {"waiting": {"reason": reason}}});
    let signalled =
        |name: &str| json!({"name": name, "state": {"terminated": {"exitCode": 137, "signal": 9}}});
    let done = ended("i", 0, "Completed");
    let ready = json!([{"type": "Ready", "status": "True"}]);
    for (status, expected) in [
        (json!({"phase": "Pending"}), ("0/3", "Pending")),
        (json!({"phase": "Failed", "reason": "Evicted"}), ("0/3", "Evicted")),
        (
            json!({"phase": "Pending", "conditions": [{"type": "PodScheduled", "reason": "SchedulingGated"}]}),
            ("0/3", "SchedulingGated"),
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [waiting("i", "PodInitializing")]}),
            ("0/3", "Init:0/2"),
        ),
        (json!({"phase": "Pending", "initContainerStatuses": [done, waiting("s", "")]}), ("0/3", "Init:1/2")),
        (
            json!({"phase": "Pending", "initContainerStatuses": [waiting("i", "ImagePullBackOff")]}),
            ("0/3", "Init:ImagePullBackOff"),
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [ended("i", 1, "Error")]}),
            ("0/3", "Init:Error"),
        ),
        (
            json!({"phase": "Pending", "initContainerStatuses": [ended("i", 3, "")]}),
            ("0/3", "Init:ExitCode:3"),
        ),
        (json!({"phase": "Pending", "initContainerStatuses": [signalled("i")]}), ("0/3", "Init:Signal:9")),
        (
            json!({"phase": "Running", "initContainerStatuses": [done, running("s")], "containerStatuses": [running("x"), running("y")]}),
            ("3/3", "Running"),
        ),
        (
            json!({"phase": "Running", "containerStatuses": [running("x"), waiting("y", "CrashLoopBackOff")]}),
            ("1/3", "CrashLoopBackOff"),
        ),
        (
            json!({"phase": "Failed", "containerStatuses": [ended("x", 2, ""), ended("y", 0, "Completed")]}),
            ("0/3", "ExitCode:2"),
        ),
        (json!({"phase": "Failed", "containerStatuses": [signalled("x")]}), ("0/3", "Signal:9")),
        (
            json!({"phase": "Failed", "containerStatuses": [ended("x", 0, "Completed"), ended("y", 1, "Error")]}),
            ("0/3", "Error"),
        ),
        (
            json!({"phase": "Succeeded", "containerStatuses": [ended("x", 0, "Completed")]}),
            ("0/3", "Completed"),
        ),
        (
            json!({"phase": "Running", "conditions": ready, "containerStatuses": [ended("x", 0, "Completed"), running("y")]}),
            ("1/3", "Running"),
        ),
        (
            json!({"phase": "Running", "containerStatuses": [ended("x", 0, "Completed"), running("y")]}),
            ("1/3", "NotReady"),
        ),
        (
            // A container of an initialized Pod is heard although an init container is started again.
            json!({"phase": "Running", "conditions": [{"type": "Initialized", "status": "True"}], "initContainerStatuses": [ended("i", 1, "Error")],
                "containerStatuses": [waiting("x", "Waits")]}),
            ("0/3", "Waits"),
        ),
    ] {
        let (ready, word, _) = pod(json!({}), status.clone());
        assert_eq!((ready.as_str(), word.as_str()), expected, "{status}");
    }
    let deleted = json!({"deletionTimestamp": "2026-01-01T00:00:00Z"});
    assert_eq!(pod(deleted.clone(), json!({"phase": "Running"})).1, "Terminating");
    assert_eq!(pod(deleted.clone(), json!({"phase": "Succeeded"})).1, "Succeeded");
    assert_eq!(pod(deleted, json!({"phase": "Running", "reason": "NodeLost"})).1, "Unknown");
}

#[test]
fn restarts_of_a_pod_are_counted_with_the_time_of_the_last_one() {
    let restarted = |name: &str, count: i64, at: &str| {
        json!({"name": name, "ready": true, "started": true, "restartCount": count, "state": {"running": {}},
        "lastState": {"terminated": {"finishedAt": at}}})
    };
    let (earlier, later) = ("2026-01-01T00:00:12Z", "2026-01-01T00:05:02Z");
    let status = json!({"phase": "Running", "containerStatuses": [restarted("x", 2, earlier), restarted("y", 1, later)]});
    assert_eq!(pod(json!({}), status).2, "3 (10s ago)");
    let status = json!({"phase": "Running", "containerStatuses": [restarted("x", 3, earlier)]});
    assert_eq!(pod(json!({}), status).2, "3 (5m ago)");
    // Those of init containers count while they are at work; later only those of the ones that go on.
    let status = json!({"phase": "Pending", "initContainerStatuses": [{"name": "i", "restartCount": 4, "state": {"waiting": {"reason": "CrashLoopBackOff"}}}]});
    assert_eq!(pod(json!({}), status).2, "4");
    let status = json!({"phase": "Running", "initContainerStatuses": [{"name": "i", "restartCount": 4, "state": {"terminated": {"exitCode": 0}}},
        restarted("s", 1, later)], "containerStatuses": [restarted("x", 2, earlier)]});
    assert_eq!(pod(json!({}), status).2, "3 (10s ago)");
}

#[test]
fn a_pod_shows_where_it_runs_and_that_it_has_ended() {
    let value = json!({"spec": {"nodeName": "node", "containers": [{"name": "x"}], "readinessGates": [{"conditionType": "g"}, {"conditionType": "h"}]},
        "status": {"phase": "Succeeded", "podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "g", "status": "True"}]}});
    assert_eq!(
        cells("", "Pod", value.clone()),
        json!(["a", "0/1", "Succeeded", "0", "5m12s", "10.0.0.1", "node", "<none>", "1/2"])
    );
    let columns = Columns::of_kind("", "Pod");
    let row = rows(&columns, &[named(value)]).remove(0);
    assert_eq!(
        row["conditions"],
        json!([{"type": "Completed", "status": "True", "reason": "Succeeded", "message": "The pod has completed successfully."}])
    );
    assert_eq!(cells("", "Pod", json!({}))[5], "<none>");
}

#[test]
fn no_shape_of_an_object_is_too_odd_to_be_shown() {
    let kinds = [
        ("", "Pod"),
        ("", "Node"),
        ("", "Event"),
        ("", "Service"),
        ("", "PersistentVolume"),
        ("", "PersistentVolumeClaim"),
        ("", "ResourceQuota"),
        ("networking.k8s.io", "Ingress"),
        ("networking.k8s.io", "NetworkPolicy"),
        ("rbac.authorization.k8s.io", "ClusterRoleBinding"),
        ("storage.k8s.io", "StorageClass"),
        ("", "Secret"),
    ];
    let odd = [
        json!(null),
        json!([]),
        json!([1, null, {}]),
        json!("text"),
        json!(-1),
        json!({"containers": 7, "conditions": "x", "hard": []}),
    ];
    for (group, kind) in kinds {
        for value in &odd {
            let object = json!({"spec": value, "status": value, "data": value, "subjects": value, "roleRef": value, "series": value});
            let columns = Columns::of_kind(group, kind);
            assert_eq!(rows(&columns, &[self::object(object)]).len(), 1, "{kind}: {value}");
        }
    }
}
