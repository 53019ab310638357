//! The core kinds and their columns, as `kubectl get` and `kubectl get -o wide` show them.

/// A core kind with columns of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    Binding,
    ConfigMap,
    Event,
    Ingress,
    Lease,
    Namespace,
    NetworkPolicy,
    Node,
    PersistentVolume,
    PersistentVolumeClaim,
    Pod,
    ResourceQuota,
    Secret,
    Service,
    ServiceAccount,
    StorageClass,
}

/// One column of a core kind.
pub(super) struct Column {
    pub name: &'static str,
    pub description: &'static str,
    /// Shown with `-o wide` alone.
    pub is_wide: bool,
}

const fn column(name: &'static str, description: &'static str) -> Column {
    Column { name, description, is_wide: false }
}

const fn wide(name: &'static str, description: &'static str) -> Column {
    Column { name, description, is_wide: true }
}

const fn plain(name: &'static str) -> Column {
    column(name, "")
}

impl Kind {
    /// Role, ClusterRole and CustomResourceDefinition have none: they are shown by name and time of creation.
    pub fn of(group: &str, kind: &str) -> Option<Self> {
        Some(match (group, kind) {
            ("", "ConfigMap") => Self::ConfigMap,
            ("" | "events.k8s.io", "Event") => Self::Event,
            ("networking.k8s.io", "Ingress") => Self::Ingress,
            ("coordination.k8s.io", "Lease") => Self::Lease,
            ("", "Namespace") => Self::Namespace,
            ("networking.k8s.io", "NetworkPolicy") => Self::NetworkPolicy,
            ("", "Node") => Self::Node,
            ("", "PersistentVolume") => Self::PersistentVolume,
            ("", "PersistentVolumeClaim") => Self::PersistentVolumeClaim,
            ("", "Pod") => Self::Pod,
            ("", "ResourceQuota") => Self::ResourceQuota,
            ("rbac.authorization.k8s.io", "RoleBinding" | "ClusterRoleBinding") => Self::Binding,
            ("", "Secret") => Self::Secret,
            ("", "Service") => Self::Service,
            ("", "ServiceAccount") => Self::ServiceAccount,
            ("storage.k8s.io", "StorageClass") => Self::StorageClass,
            _ => return None,
        })
    }

    pub fn columns(self) -> &'static [Column] {
        match self {
            Self::Binding => {
                const {
                    &[
                        plain("Name"),
                        column("Role", "The role that is granted."),
                        plain("Age"),
                        wide("Users", "Users that have the role."),
                        wide("Groups", "Groups that have the role."),
                        wide("ServiceAccounts", "ServiceAccounts that have the role, with their namespaces."),
                    ]
                }
            }
            Self::ConfigMap => {
                const { &[plain("Name"), column("Data", "How many keys there are."), plain("Age")] }
            }
            Self::Event => {
                const {
                    &[
                        column("Last Seen", "How long ago it happened last."),
                        column("Type", "Normal or Warning."),
                        column("Reason", "Why it happened, in one word."),
                        column("Object", "What it happened to."),
                        wide("Subobject", "The part of the object."),
                        wide("Source", "Who told it."),
                        column("Message", "What happened."),
                        wide("First Seen", "How long ago it happened first."),
                        wide("Count", "How often it happened."),
                        wide("Name", ""),
                    ]
                }
            }
            Self::Ingress => {
                const {
                    &[
                        plain("Name"),
                        column("Class", "The IngressClass."),
                        column("Hosts", "The hosts of the rules."),
                        column("Address", "Where the load balancer is reached."),
                        column("Ports", "The ports that are open."),
                        plain("Age"),
                    ]
                }
            }
            Self::Lease => const { &[plain("Name"), column("Holder", "Who holds it."), plain("Age")] },
            Self::Namespace => {
                const { &[plain("Name"), column("Status", "Active or Terminating."), plain("Age")] }
            }
            Self::NetworkPolicy => {
                const { &[plain("Name"), column("Pod-Selector", "The pods it is for."), plain("Age")] }
            }
            Self::Node => {
                const {
                    &[
                        plain("Name"),
                        column("Status", "Whether it is ready and takes pods."),
                        column("Roles", "Its roles, by its labels."),
                        plain("Age"),
                        column("Version", "The version of its agent."),
                        wide("Internal-IP", "Its address inside the cluster."),
                        wide("External-IP", "Its address outside the cluster."),
                        wide("OS-Image", "Its operating system."),
                        wide("Kernel-Version", "Its kernel."),
                        wide("Container-Runtime", "What runs its containers."),
                    ]
                }
            }
            Self::PersistentVolume => {
                const {
                    &[
                        plain("Name"),
                        column("Capacity", "Its size."),
                        column("Access Modes", "How it can be mounted."),
                        column("Reclaim Policy", "What becomes of it when its claim is gone."),
                        column("Status", "Its phase."),
                        column("Claim", "The claim it is bound to."),
                        column("StorageClass", "Its StorageClass."),
                        column("VolumeAttributesClass", "Its VolumeAttributesClass."),
                        column("Reason", "Why it is in its phase."),
                        plain("Age"),
                        wide("VolumeMode", "Filesystem or Block."),
                    ]
                }
            }
            Self::PersistentVolumeClaim => {
                const {
                    &[
                        plain("Name"),
                        column("Status", "Its phase."),
                        column("Volume", "The volume it is bound to."),
                        column("Capacity", "The size of the volume."),
                        column("Access Modes", "How the volume can be mounted."),
                        column("StorageClass", "Its StorageClass."),
                        column("VolumeAttributesClass", "Its VolumeAttributesClass."),
                        plain("Age"),
                        wide("VolumeMode", "Filesystem or Block."),
                    ]
                }
            }
            Self::Pod => {
                const {
                    &[
                        plain("Name"),
                        column("Ready", "How many of its containers are ready."),
                        column("Status", "What its containers do, in one word."),
                        column(
                            "Restarts",
                            "How often containers were started again, and how long ago the last one was.",
                        ),
                        plain("Age"),
                        wide("IP", "Its address."),
                        wide("Node", "The node it runs on."),
                        wide("Nominated Node", "The node that makes room for it."),
                        wide("Readiness Gates", "How many of its further conditions are true."),
                    ]
                }
            }
            Self::ResourceQuota => {
                const {
                    &[
                        plain("Name"),
                        column("Request", "What is used of what may be used."),
                        column("Limit", "What is used of what may be used, of limits."),
                        plain("Age"),
                    ]
                }
            }
            Self::Secret => {
                const {
                    &[
                        plain("Name"),
                        column("Type", "What it is for."),
                        column("Data", "How many keys there are."),
                        plain("Age"),
                    ]
                }
            }
            Self::Service => {
                const {
                    &[
                        plain("Name"),
                        column("Type", "How it is reached."),
                        column("Cluster-IP", "Its address inside the cluster."),
                        column("External-IP", "Its addresses outside the cluster."),
                        column("Port(s)", "Its ports."),
                        plain("Age"),
                        wide("Selector", "The labels of its pods."),
                    ]
                }
            }
            Self::ServiceAccount => const { &[plain("Name"), plain("Age")] },
            Self::StorageClass => {
                const {
                    &[
                        plain("Name"),
                        column("Provisioner", "Who makes its volumes."),
                        column("ReclaimPolicy", "What becomes of a volume when its claim is gone."),
                        column("VolumeBindingMode", "When its volumes are made."),
                        column("AllowVolumeExpansion", "Whether its volumes can grow."),
                        plain("Age"),
                    ]
                }
            }
        }
    }
}
