//! Which kinds there are: the core ones that are compiled in as data, and those of CustomResourceDefinitions.

mod core;
mod discovery;

pub use core::core;
pub use discovery::Discovery;

use crate::request::Verb;

/// The verbs of a resource that is kept.
const KEPT: &[Verb] = &[
    Verb::Create,
    Verb::Delete,
    Verb::DeleteCollection,
    Verb::Get,
    Verb::List,
    Verb::Patch,
    Verb::Update,
    Verb::Watch,
];
/// Those of one that is answered and forgotten, such as a review.
const ASKED: &[Verb] = &[Verb::Create];
/// Those of a part of an object.
const PART: &[Verb] = &[Verb::Get, Verb::Patch, Verb::Update];

/// A part of an object with an address of its own.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Subresource {
    pub name: String,
    pub verbs: &'static [Verb],
    /// What is read and written there, if that is not the kind of the object.
    pub kind: Option<GroupVersionKind>,
}

/// The name of a kind.
#[derive(Clone, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct GroupVersionKind {
    /// Empty for the core group.
    pub group: String,
    pub version: String,
    pub kind: String,
}

impl GroupVersionKind {
    pub fn new(group: &str, version: &str, kind: &str) -> Self {
        Self { group: group.into(), version: version.into(), kind: kind.into() }
    }

    /// `apiVersion` of its objects.
    pub fn api_version(&self) -> String {
        match self.group.as_str() {
            "" => self.version.clone(),
            group => format!("{group}/{}", self.version),
        }
    }
}

/// What a resource is called, and what can be done with it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Names {
    pub gvk: GroupVersionKind,
    /// The resource itself, as in paths and rules.
    pub plural: String,
    pub singular: String,
    pub short_names: Vec<String>,
    pub categories: Vec<String>,
    pub is_namespaced: bool,
    pub verbs: &'static [Verb],
    pub subresources: Vec<Subresource>,
}

impl Names {
    /// The part of the objects by that name.
    pub fn subresource(&self, name: &str) -> Option<&Subresource> {
        self.subresources.iter().find(|part| part.name == name)
    }

    /// Whether objects are kept, rather than answered.
    pub fn is_kept(&self) -> bool {
        self.verbs.contains(&Verb::Get)
    }
}
