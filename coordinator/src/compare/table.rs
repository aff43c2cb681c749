//! All runs' quantities for people: a row for each quantity and run, a column an iteration.

use comfy_table::{Cell, CellAlignment, Table, presets};

use super::{Quantity, RunMeasures};

/// The table; quantities that no run has are left out.
pub fn render(quantities: &[Quantity], runs: &[RunMeasures]) -> String {
    let last = runs.iter().flat_map(|run| &run.iterations).map(|m| m.iteration.0).max();
    let iterations: Vec<u32> = (0..=last.unwrap_or(0)).collect();
    let right = |text: String| Cell::new(text).set_alignment(CellAlignment::Right);
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    let header = ["by iteration".to_owned(), String::new()].into_iter().map(Cell::new);
    table.add_row(header.chain(iterations.iter().map(|k| right(k.to_string()))));
    for (at, quantity) in quantities.iter().enumerate() {
        let value = |run: &RunMeasures, k: u32| {
            run.iterations.iter().find(|m| m.iteration.0 == k).and_then(|m| m.values[at])
        };
        if !runs.iter().any(|run| iterations.iter().any(|&k| value(run, k).is_some())) {
            continue;
        }
        for (n, run) in runs.iter().enumerate() {
            let name = if n == 0 { quantity.name } else { "" };
            let cells = iterations.iter().map(|&k| {
                let text = value(run, k).map(|v| format!("{v:.*}", quantity.digits));
                right(text.unwrap_or_else(|| "-".to_owned()))
            });
            table.add_row([Cell::new(name), Cell::new(&run.name)].into_iter().chain(cells));
        }
    }
    table.trim_fmt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compare::{Measured, QUANTITIES};
    use crate::domain::Iteration;

    #[test]
    fn runs_stand_under_each_other_and_what_none_has_is_left_out() {
        let run = |name: &str, losses: &[f64]| RunMeasures {
            name: name.to_owned(),
            method: "drift".to_owned(),
            model: "m".to_owned(),
            iterations: (0..)
                .zip(losses)
                .map(|(k, loss)| {
                    let mut values = vec![None; QUANTITIES.len()];
                    values[1] = Some(*loss);
                    Measured { iteration: Iteration(k), values }
                })
                .collect(),
        };
        let text = render(&QUANTITIES, &[run("long", &[0.5, 0.25]), run("short", &[0.125])]);
        let lines: Vec<Vec<&str>> =
            text.lines().map(|line| line.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["by", "iteration", "0", "1"]);
        assert_eq!(lines[1], ["loss", "long", "0.5000", "0.2500"]);
        assert_eq!(lines[2], ["short", "0.1250", "-"]);
        assert_eq!(lines.len(), 3, "{text}");
    }
}
