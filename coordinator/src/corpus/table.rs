//! Counts as tables for people.

use std::fmt;

use comfy_table::{Cell, CellAlignment, Table, presets};

use super::counts::{Counts, Kind};

/// Counts of several files, side by side.
#[derive(Debug, Clone, Copy)]
pub struct Report<'c>(
    /// One entry a file.
    pub &'c [Counts],
);

impl fmt::Display for Counts {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Report(std::slice::from_ref(self)).fmt(f)
    }
}

/// A row of the table: its name, and its number for a file.
type Row = (&'static str, fn(&Counts) -> u64);

const FOUND: [Row; 8] = [
    ("records", |c| c.records),
    ("conversations", |c| c.conversations),
    ("  with a DSAT turn", |c| c.conversations_with_dsat),
    ("  with a SAT turn", |c| c.conversations_with_sat),
    ("utterances", |c| c.utterances),
    ("DSAT turns", |c| c.labels.dsat),
    ("SAT turns", |c| c.labels.sat),
    ("mixed turns", |c| c.labels.mixed),
];
const GIVEN: [Row; 5] = [
    ("DSAT samples", |c| c.kept(Kind::Dsat)),
    ("SAT samples", |c| c.kept(Kind::Sat)),
    ("seed pairs", |c| c.kept(Kind::Seed)),
    ("dropped", |c| [Kind::Dsat, Kind::Sat, Kind::Seed].map(|kind| c.dropped(kind)).iter().sum()),
    ("malformed", |c| c.malformed),
];

impl fmt::Display for Report<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let several = self.0.len() > 1;
        let mut table = Table::new();
        table.load_style(presets::NOTHING);
        let texts = |of: fn(&Counts) -> String| self.0.iter().map(of);
        let total = || several.then(String::new).into_iter();
        let mut line = |name: &str, cells: &mut dyn Iterator<Item = String>| {
            let mut row = vec![Cell::new(name)];
            row.extend(cells.map(|text| Cell::new(text).set_alignment(CellAlignment::Right)));
            table.add_row(row);
        };
        line("file", &mut texts(|c| c.file.clone()).chain(several.then(|| "total".to_owned())));
        line("format", &mut texts(|c| c.format.to_string()).chain(total()));
        line("container", &mut texts(|c| c.container.to_string()).chain(total()));
        let bytes: u64 = self.0.iter().map(|c| c.bytes).sum();
        line("size", &mut texts(|c| size(c.bytes)).chain(several.then(|| size(bytes))));
        for (name, number) in FOUND.into_iter().chain(GIVEN) {
            let sum: u64 = self.0.iter().map(number).sum();
            line(
                name,
                &mut self.0.iter().map(|c| grouped(number(c))).chain(several.then(|| grouped(sum))),
            );
        }
        writeln!(f, "{}", table.trim_fmt())?;
        self.0.iter().try_for_each(|counts| notes(counts, several, f))
    }
}

/// What the numbers leave out: why records were dropped, and what was malformed.
fn notes(counts: &Counts, several: bool, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    let of = if several { format!(" of {}", counts.file) } else { String::new() };
    if counts.dropped.values().any(|reasons| !reasons.is_empty()) {
        writeln!(f, "\ndropped{of}")?;
        let reasons = counts
            .dropped
            .iter()
            .flat_map(|(kind, reasons)| reasons.iter().map(move |r| (kind, r)));
        for (kind, (reason, count)) in reasons {
            writeln!(f, "{:>11}  {kind:<11}  {reason}", grouped(*count))?;
        }
    }
    if !counts.examples.is_empty() {
        writeln!(
            f,
            "\nmalformed{of}, skipped: the first {} of {}",
            counts.examples.len(),
            counts.malformed
        )?;
        for example in &counts.examples {
            writeln!(f, "  {example}")?;
        }
    }
    if let Some(end) = counts.truncated {
        writeln!(f, "\ncut off{of}: the file ends too early, in {end}; fetch it again")?;
    }
    Ok(())
}

/// 1234567 as `1,234,567`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut out = String::with_capacity(digits.len() * 4 / 3);
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Bytes in the unit that people use.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", UNITS[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_and_sizes_have_units() {
        assert_eq!([0, 999, 1000, 1_234_567].map(grouped), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!([17, 1536, 1_600_000_000].map(size), ["17 B", "1.5 KiB", "1.5 GiB"]);
    }
}
