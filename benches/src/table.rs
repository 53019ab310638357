//! Samples in, Markdown out.

use std::collections::BTreeMap;

/// Whether a larger number is the better one.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Better {
    Higher,
    Lower,
}

/// Whom the first contestant is compared with.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Against {
    /// The best of the others, row by row.
    Best,
    /// Each of the others.
    Each,
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

    /// Prints medians (min-max) and, last, ratios of the first contestant to others: above 1 means the first is ahead,
    /// whatever the unit.
    pub fn print(&self, against: Against) {
        let peers = self.contestants.get(1..).unwrap_or_default();
        let ratios: Vec<String> = match against {
            Against::Best => vec!["ahead of the best peer".to_owned()],
            Against::Each => peers.iter().map(|peer| format!("ahead of {peer}")).collect(),
        };
        let columns: Vec<&str> = self.contestants.iter().chain(&ratios).map(String::as_str).collect();
        println!("| | {} |", columns.join(" | "));
        println!("| --- |{}", " --- |".repeat(columns.len()));
        for (at, (row, better)) in self.rows.iter().enumerate() {
            let mut line = format!("| {row} |");
            let mut medians = Vec::new();
            for who in 0..self.contestants.len() {
                let spread = self.samples.get(&(at, who)).map(|samples| spread(samples));
                medians.push(spread.map(|(_, median, _)| median));
                line += &match spread {
                    Some((low, median, high)) => {
                        format!(" {} ({}-{}) |", number(median), number(low), number(high))
                    }
                    None => " - |".to_owned(),
                };
            }
            let ours = medians.first().copied().flatten();
            let peers = medians.get(1..).unwrap_or_default();
            let compared = match against {
                Against::Best => vec![peers.iter().flatten().copied().reduce(|a, b| better.of(a, b))],
                Against::Each => peers.to_vec(),
            };
            for peer in compared {
                line += &match (ours, peer, better) {
                    (Some(ours), Some(peer), Better::Higher) => format!(" {:.2}x |", ours / peer),
                    (Some(ours), Some(peer), Better::Lower) => format!(" {:.2}x |", peer / ours),
                    _ => " |".to_owned(),
                };
            }
            println!("{line}");
        }
    }
}

impl Better {
    fn of(self, a: f64, b: f64) -> f64 {
        match self {
            Better::Higher => a.max(b),
            Better::Lower => a.min(b),
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
        v if v >= 1000.0 => format!("{v:.0}"),
        v if v >= 10.0 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}
