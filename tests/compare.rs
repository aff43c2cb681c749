//! Two runs side by side, against what their files say.

use std::collections::BTreeSet;

use serde_json::Value;

use crate::support::{coordinator, data, demo_model, ended, metrics, small, small_model, succeeds};

#[test]
fn runs_are_put_side_by_side_as_table_numbers_and_plots() {
    let folder = tempfile::tempdir().unwrap();
    let model = folder.path().join("model");
    small_model::write(&demo_model(), &model).unwrap();
    let runs = ["drift", "spin"].map(|method| {
        let run = folder.path().join(format!("run-{method}"));
        let mut command = small(&run, "1", &model);
        command.args(["--set", &format!("method={method}"), "--set", "training.iterations=2"]);
        command.args(["--corpus", data("sat_dsat_annotation.json").to_str().unwrap()]);
        succeeds(command);
        run
    });
    let plots = folder.path().join("plots");
    let compare = |more: &[&str]| {
        let mut command = coordinator(&["compare"]);
        command.args(&runs).args(more);
        succeeds(command).stdout
    };
    let told: Vec<Value> = serde_json::from_str(&compare(&["--json"])).unwrap();
    for (run, told) in runs.iter().zip(&told) {
        assert_eq!(told["iterations"].as_array().unwrap().len(), 3);
        let lines = metrics(run, 2);
        let losses: Vec<f64> = lines.iter().filter_map(|line| line["loss"].as_f64()).collect();
        let last = &told["iterations"][2];
        let mean = losses.iter().sum::<f64>() / losses.len() as f64;
        assert!((last["loss"].as_f64().unwrap() - mean).abs() < 1e-12, "{last}");
        let evaluated = lines.iter().rfind(|line| line["eval_loss"].is_number()).unwrap();
        assert_eq!(last["held-out margin"], evaluated["eval_rewards/margins"]);

        let pairs = run.join("iterations/02/pairs.parquet");
        let rows = drift_coordinator::store::pairs::read_pairs(&pairs).unwrap();
        let is_spin = told["method"] == "spin";
        let drawn = rows.iter().map(|row| if is_spin { &row.rejected } else { &row.chosen });
        let words: Vec<String> =
            drawn.flat_map(|text| text.split_whitespace()).map(str::to_lowercase).collect();
        let different: BTreeSet<&String> = words.iter().collect();
        let distinct = different.len() as f64 / words.len() as f64;
        assert_eq!(last["distinct-1"].as_f64().unwrap(), distinct);
        assert!(
            told["iterations"][0]["distinct-1"].is_null(),
            "nothing is drawn in the warm start"
        );
    }
    let table = compare(&["--plots", plots.to_str().unwrap()]);
    for word in ["run-drift", "run-spin", "mean σ(−s)", "self-BLEU", "gradient norm"] {
        assert!(table.contains(word), "{word} is not in: {table}");
    }
    let svg = std::fs::read_to_string(plots.join("compare.svg")).unwrap();
    assert!(svg.starts_with("<svg") && svg.contains("run-spin (spin)"), "{}", &svg[..200]);
    assert!(svg.contains("polyline") && svg.contains("held-out margin"));
    let png = std::fs::read(plots.join("compare.png")).unwrap();
    assert_eq!(&png[..8], b"\x89PNG\r\n\x1a\n");
    assert!(png.len() > 20_000, "a blank figure would be smaller than {} bytes", png.len());

    let nothing = ended(coordinator(&["compare", folder.path().to_str().unwrap()]));
    assert_eq!(nothing.code, Some(1));
    assert!(nothing.stderr.contains("no run in"), "{}", nothing.stderr);
}
