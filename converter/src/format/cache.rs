//! A bounded cache of tables that are read when they are needed.

use std::collections::{HashMap, VecDeque};

/// Tables by their index, evicted by the clock algorithm: in order of age, but for those used meanwhile.
pub(super) struct Cache<T> {
    tables: HashMap<u64, Slot<T>>,
    /// Every index in `tables` once, the oldest first.
    ring: VecDeque<u64>,
    tables_max: usize,
}

struct Slot<T> {
    table: T,
    used: bool,
}

impl<T: Clone> Cache<T> {
    /// Keeps at most `tables_max` tables, which is not zero.
    pub(super) fn new(tables_max: usize) -> Self {
        Self { tables: HashMap::new(), ring: VecDeque::new(), tables_max }
    }

    /// Returns the table number `index`, if it is here.
    pub(super) fn get(&mut self, index: u64) -> Option<T> {
        let slot = self.tables.get_mut(&index)?;
        slot.used = true;
        Some(slot.table.clone())
    }

    /// Keeps `table`, and forgets another if there are too many.
    pub(super) fn put(&mut self, index: u64, table: T) {
        if let Some(slot) = self.tables.get_mut(&index) {
            slot.table = table;
            return;
        }
        while self.tables.len() >= self.tables_max
            && let Some(oldest) = self.ring.pop_front()
        {
            match self.tables.get_mut(&oldest) {
                // A second chance; after one round at the latest nobody has one left.
                Some(slot) if slot.used => {
                    slot.used = false;
                    self.ring.push_back(oldest);
                }
                _ => _ = self.tables.remove(&oldest),
            }
        }
        self.ring.push_back(index);
        self.tables.insert(index, Slot { table, used: false });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_its_bound_and_the_tables_in_use() {
        let mut cache = Cache::new(8);
        cache.put(1000, "table");
        for index in 0..100 {
            assert!(cache.get(1000).is_some(), "evicted before {index}");
            cache.put(index, "table");
            // Again: it is no second one.
            cache.put(index, "table");
            assert!(cache.tables.contains_key(&index));
            assert!(cache.tables.len() <= 8);
            assert_eq!(cache.tables.len(), cache.ring.len());
        }
    }
}
