//! Samples in, Markdown out.

use std::collections::BTreeMap;

/// Whether a larger number is the better one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// Samples by row and contestant, in the order they first came.
#[derive(Default)]
pub struct Table {
    rows: Vec<(String, Better)>,
    contestants: Vec<String>,
    samples: BTreeMap<(usize, usize), Vec<f64>>,
}

impl Table {
    /// Adds one measurement.
    pub fn add(&mut self, row: &str, better: Better, contestant: &str, value: f64) {
        let at = self.rows.iter().position(|(name, _)| name == row).unwrap_or_else(|| {
            self.rows.push((row.to_owned(), better));
            self.rows.len() - 1
        });
        let who = self.contestants.iter().position(|name| name == contestant).unwrap_or_else(|| {
            self.contestants.push(contestant.to_owned());
            self.contestants.len() - 1
        });
        self.samples.entry((at, who)).or_default().push(value);
    }

    /// Prints medians (min-max) and, last, the ratio of the first contestant to the best of the others: above 1 means
    /// the first is ahead, whatever the unit.
    pub fn print(&self) {
        println!("| | {} | ahead of the best peer |", self.contestants.join(" | "));
        println!("| --- |{} --- |", " --- |".repeat(self.contestants.len()));
        for (at, (row, better)) in self.rows.iter().enumerate() {
            let mut medians = Vec::new();
            let mut line = format!("| {row} |");
            for who in 0..self.contestants.len() {
                match self.samples.get(&(at, who)) {
                    Some(samples) => {
                        let (low, median, high) = spread(samples);
                        line += &format!(" {} ({}-{}) |", number(median), number(low), number(high));
                        medians.push((who, median));
                    }
                    None => line += " - |",
                }
            }
            let ours = medians.iter().find(|(who, _)| *who == 0).map(|(_, median)| *median);
            let peers = medians.iter().filter(|(who, _)| *who != 0).map(|(_, median)| *median);
            let best = match better {
                Better::Higher => peers.reduce(f64::max),
                Better::Lower => peers.reduce(f64::min),
            };
            line += &match (ours, best, better) {
                (Some(ours), Some(best), Better::Higher) => format!(" {:.2}x |", ours / best),
                (Some(ours), Some(best), Better::Lower) => format!(" {:.2}x |", best / ours),
                _ => " |".to_owned(),
            };
            println!("{line}");
        }
    }
}

fn spread(samples: &[f64]) -> (f64, f64, f64) {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    let median =
        if sorted.len() % 2 == 1 { sorted[middle] } else { (sorted[middle - 1] + sorted[middle]) / 2.0 };
    (sorted[0], median, sorted[sorted.len() - 1])
}

fn number(value: f64) -> String {
    match value {
        v if v >= 100.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}
