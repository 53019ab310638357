//! What a request selects, and how a list of it is shown: selectors, JSONPath, Table.
