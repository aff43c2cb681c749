use super::*;

fn summary() -> RunSummary {
    let warm = IterationSummary {
        iteration: Iteration(0),
        pairs_trained: 92,
        pairs_held_out: 100,
        steps: 69,
        first_loss: std::f64::consts::LN_2,
        last_loss: 0.612_34,
        held_out: Some(HeldOut { loss: 0.65, accuracy: 0.71, margin: 0.1234 }),
        logps_chosen: StartEnd { start: -312.44, end: -298.06 },
        logps_rejected: StartEnd { start: -305.0, end: -321.55 },
        sampled_tokens: 0,
        sampled_tokens_per_second: None,
        trained_pairs_per_second: 0.4567,
        reduce_seconds: 12.5,
        exposed_seconds: 2.5,
        warnings: BTreeMap::from([("signal_vanishes".into(), 3)]),
        seconds: BTreeMap::from([("scored".into(), 61.0), ("trained".into(), 604.4)]),
        checkpoint: "iterations/00/checkpoint".into(),
    };
    let first = IterationSummary {
        iteration: Iteration(1),
        pairs_trained: 10_532,
        held_out: None,
        logps_chosen: StartEnd { start: -1312.44, end: -1298.06 },
        logps_rejected: StartEnd { start: -1305.0, end: -1321.55 },
        sampled_tokens: 5_392_384,
        sampled_tokens_per_second: Some(16_200.0),
        trained_pairs_per_second: 98.04,
        seconds: ["sampled", "scored", "trained", "evaluated", "published"]
            .map(|phase| (phase.to_owned(), 90_000.0))
            .into(),
        ..warm.clone()
    };
    RunSummary {
        run_id: "r1".into(),
        drift_version: "0.1.0".into(),
        base_model: "Qwen/Qwen2.5-7B-Instruct".into(),
        method: "drift".into(),
        workers: 8,
        seed: 42,
        seconds: 5025.0,
        iterations: vec![warm, first],
        checkpoint: "/data/runs/a \"b\"/iterations/01/checkpoint".into(),
    }
}

#[test]
fn the_closing_report_reads_as_it_should() {
    let expected = r#"drift from Qwen/Qwen2.5-7B-Instruct: 2 iterations, 10,624 pairs trained, 8 workers, 1 h 23 min

 iter   pairs  held out             loss  accuracy   margin      logp chosen    logp rejected
─────────────────────────────────────────────────────────────────────────────────────────────
    0      92       100  0.6931 → 0.6123    71.0 %  +0.1234  -312.4 → -298.1  -305.0 → -321.6
    1  10,532       100  0.6931 → 0.6123         -        -    -1312 → -1298    -1305 → -1322

 iter     tokens  tokens/s  pairs/s  sampling   scoring  training  evaluating  publishing
─────────────────────────────────────────────────────────────────────────────────────────
    0          0         -     0.46         -      1:01     10:04           -           -
    1  5,392,384    16,200     98.0  25:00:00  25:00:00  25:00:00    25:00:00    25:00:00

checkpoint: /data/runs/a "b"/iterations/01/checkpoint
load it with transformers:

    from transformers import AutoModelForCausalLM, AutoTokenizer
    tokenizer = AutoTokenizer.from_pretrained("/data/runs/a \"b\"/iterations/01/checkpoint")
    model = AutoModelForCausalLM.from_pretrained("/data/runs/a \"b\"/iterations/01/checkpoint", dtype="auto")
"#;
    let shown = render(&summary(), Glyphs::Unicode);
    assert_eq!(shown, expected, "{shown}");
}

#[test]
fn no_line_of_the_tables_is_wider_than_a_hundred_columns() {
    for glyphs in [Glyphs::Unicode, Glyphs::Ascii] {
        let shown = render(&summary(), glyphs);
        let tables = shown.split("checkpoint:").next().unwrap();
        let widest = tables.lines().map(|line| line.chars().count()).max().unwrap();
        assert!(widest <= 100, "{widest}\n{tables}");
        assert_eq!(glyphs == Glyphs::Ascii, shown.is_ascii());
        assert!(!shown.contains('\u{1b}'), "no colours");
    }
}

#[test]
fn the_locale_decides_on_glyphs() {
    for (locale, glyphs) in [
        ("de_DE.UTF-8", Glyphs::Unicode),
        ("C.utf8", Glyphs::Unicode),
        ("POSIX", Glyphs::Ascii),
        ("", Glyphs::Ascii),
    ] {
        assert_eq!(Glyphs::of_locale(locale), glyphs, "{locale}");
    }
}

#[test]
fn summary_json_comes_back_as_it_went() {
    let json = summary().to_json().unwrap();
    assert_eq!(serde_json::from_slice::<RunSummary>(&json).unwrap(), summary());
    assert_eq!(json.last(), Some(&b'\n'));
}
