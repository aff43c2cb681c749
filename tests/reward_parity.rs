//! Reward models rate as `transformers` does, live.

use std::collections::BTreeMap;
use std::ops::ControlFlow;

use drift_worker::reward::RewardModel;
use tch::{Device, Kind};

use crate::support::ask;
use crate::support::model::{text, token_lists};

/// Bound on |ours − theirs| in a rating, in fp32.
const RATING: f64 = 1e-4;

#[test]
fn ratings_are_those_of_transformers() {
    let dir = tempfile::tempdir().unwrap();
    let reply = ask("reward_reference.py", &[text(dir.path())]);
    let sequences = token_lists(&reply["sequences"]);
    let ratings: BTreeMap<String, Vec<f64>> =
        serde_json::from_value(reply["ratings"].clone()).unwrap();
    assert!(ratings.len() >= 14, "{ratings:?}");
    for (name, theirs) in ratings {
        let model = RewardModel::load(&dir.path().join(&name), Kind::Float, Device::Cpu).unwrap();
        let ours = model.rate(&sequences, &mut |_| ControlFlow::Continue(())).unwrap();
        assert_eq!(ours.len(), theirs.len());
        let differences = ours.iter().zip(&theirs).map(|(ours, theirs)| (ours - theirs).abs());
        let difference = differences.fold(0.0, f64::max);
        let [lowest, highest] = [f64::min, f64::max].map(|of| theirs.iter().copied().reduce(of));
        let spread = highest.unwrap() - lowest.unwrap();
        eprintln!("{name}: ratings over {spread:.2}, within {difference:.1e} (bound {RATING:.0e})");
        assert!(difference < RATING, "{name}: {ours:?} and {theirs:?}");
        assert!(spread > 0.5, "{name} rates all alike: {theirs:?}");
    }
}
