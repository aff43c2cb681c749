//! What top-k, top-p and min-p leave of one row's tokens, and a draw from it.

use super::SamplingParams;

/// A token that may be drawn, and how probable that is.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Survivor {
    /// Its id.
    pub id: u32,
    /// Its probability among all that may be.
    pub probability: f64,
}

/// A token that may be drawn.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct Candidate {
    /// Logit over temperature, fp32.
    pub(super) score: f32,
    pub(super) id: u32,
}

/// From the most probable down; equal scores stand in order of their ids.
fn sorted(mut candidates: Vec<Candidate>) -> Vec<Candidate> {
    candidates.sort_unstable_by(|a, b| b.score.total_cmp(&a.score).then(a.id.cmp(&b.id)));
    candidates
}

/// How one row is cut down and drawn from.
pub(super) struct Cut<'a> {
    pub(super) params: &'a SamplingParams,
    /// ln Σ exp(score) over the whole vocabulary.
    pub(super) log_normaliser: f64,
    pub(super) uniform: f64,
}

impl Cut<'_> {
    /// Draws from what top-k, top-p and min-p leave, by inverse CDF from the most
    /// probable token down.
    ///
    /// `candidates` are all tokens whose score is above some bound. `None` if they do
    /// not settle it; never if they are `complete`.
    pub(super) fn draw(&self, candidates: Vec<Candidate>, complete: bool) -> Option<u32> {
        let candidates = sorted(candidates);
        let (kept, total) = self.keep(&candidates, complete)?;
        let target = self.uniform * total;
        let mut below = 0.0;
        for candidate in kept {
            below += self.mass(candidate);
            if target < below {
                return Some(candidate.id);
            }
        }
        // Rounding can leave the sum of all a hair under the target. Where nothing was cut
        // away, the rest of the mass may also be with those that are no candidates.
        let cut = kept.len() < candidates.len();
        kept.last().filter(|_| cut || complete).map(|candidate| candidate.id)
    }

    /// All that [`Self::draw`] may draw. `None` as there, and where others may be left
    /// that are no candidates.
    pub(super) fn survivors(
        &self,
        candidates: Vec<Candidate>,
        complete: bool,
    ) -> Option<Vec<Survivor>> {
        let candidates = sorted(candidates);
        let (kept, total) = self.keep(&candidates, complete)?;
        let survivor = |candidate: &Candidate| Survivor {
            id: candidate.id,
            probability: self.mass(candidate) / total,
        };
        let settled = complete || kept.len() < candidates.len();
        settled.then(|| kept.iter().map(survivor).collect())
    }

    /// Those that are left, and their mass.
    fn keep<'a>(&self, sorted: &'a [Candidate], complete: bool) -> Option<(&'a [Candidate], f64)> {
        let SamplingParams { top_k, top_p, min_p, .. } = *self.params;
        let mut kept = sorted;
        let mut total = 1.0;
        if top_k > 0 {
            match sorted.get(top_k as usize - 1) {
                // Those that tie with the last one stay, as in transformers.
                Some(last) => kept = &sorted[..sorted.partition_point(|c| c.score >= last.score)],
                None if complete => {}
                None => return None,
            }
            total = kept.iter().map(|candidate| self.mass(candidate)).sum();
        }
        if top_p < 1.0 {
            let (mut sum, bound) = (0.0, top_p * total);
            let reached = kept.iter().position(|candidate| {
                sum += self.mass(candidate);
                sum >= bound
            });
            match reached {
                Some(last) => kept = &kept[..=last],
                None if complete || top_k > 0 => {}
                None => return None,
            }
            total = sum;
        }
        if min_p > 0.0 {
            let bound = sorted.first()?.score + min_p.ln() as f32;
            let all_kept = kept.len();
            kept = &kept[..kept.partition_point(|candidate| candidate.score >= bound)];
            if kept.len() == all_kept && all_kept == sorted.len() && !complete {
                return None;
            }
            total = kept.iter().map(|candidate| self.mass(candidate)).sum();
        }
        Some((kept, total))
    }

    fn mass(&self, candidate: &Candidate) -> f64 {
        (f64::from(candidate.score) - self.log_normaliser).exp()
    }
}
