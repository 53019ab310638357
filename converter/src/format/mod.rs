//! Formats side by side: one folder each, and the factory that probes.
