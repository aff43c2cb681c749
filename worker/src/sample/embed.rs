//! Embeddings: what the model makes of a whole text, as one direction.

use std::ops::{ControlFlow, Range};

use tch::{TchError, Tensor};

use super::states::last_states;
use super::{SampleError, Sampler};
use crate::host;
use crate::model::{Decoder, check_tokens};

/// Tokens of one pass at most; a longer sequence has a pass of its own.
const PASS_TOKENS: usize = 2048;

/// Keeps a length of 0 from dividing, as `torch.nn.functional.normalize` does.
const LEAST_LENGTH: f64 = 1e-12;

impl Sampler {
    /// The hidden state of each sequence's last token behind the final norm, in fp32 and
    /// scaled to length 1: as many numbers as the model's hidden size, for each sequence
    /// in order.
    ///
    /// Sequences are packed, without padding; there is no cache, and no logits. `observe`
    /// is called after every pass with the number of sequences that are done; when it
    /// breaks, this ends as [`SampleError::Stopped`].
    ///
    /// # Errors
    /// Sequences without tokens, or with ids outside the vocabulary; a model that computes
    /// no numbers; libtorch's.
    pub fn embed(
        &self,
        sequences: &[Vec<u32>],
        observe: &mut dyn FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Vec<f32>>, SampleError> {
        for (at, tokens) in sequences.iter().enumerate() {
            check_tokens(self.model.config.vocab_size, &format_args!("sequence {at}"), tokens)
                .map_err(SampleError::Invalid)?;
        }
        let mut embedded = Vec::with_capacity(sequences.len());
        for pass in passes(sequences) {
            let rows = tch::no_grad(|| embed(&self.model, &sequences[pass]))?;
            let hidden = rows.size2()?.1 as usize;
            for row in host::read(&rows)?.chunks_exact(hidden) {
                if !row.iter().all(|element| element.is_finite()) {
                    return Err(SampleError::NotFinite);
                }
                embedded.push(row.to_vec());
            }
            if observe(embedded.len()).is_break() {
                return Err(SampleError::Stopped);
            }
        }
        Ok(embedded)
    }
}

/// Sequences that are computed together: neighbours, within [`PASS_TOKENS`].
fn passes(sequences: &[Vec<u32>]) -> Vec<Range<usize>> {
    let mut passes: Vec<Range<usize>> = Vec::new();
    let mut tokens = 0;
    for (at, sequence) in sequences.iter().enumerate() {
        match passes.last_mut() {
            Some(pass) if tokens + sequence.len() <= PASS_TOKENS => pass.end = at + 1,
            _ => {
                passes.push(at..at + 1);
                tokens = 0;
            }
        }
        tokens += sequence.len();
    }
    passes
}

/// One pass: `[sequences, hidden]`, fp32.
fn embed(model: &Decoder, sequences: &[Vec<u32>]) -> Result<Tensor, TchError> {
    let all: Vec<&[u32]> = sequences.iter().map(Vec::as_slice).collect();
    let h = last_states(model, &all)?;
    let lengths = h.f_norm_scalaropt_dim(2, [-1], true)?.f_clamp_min(LEAST_LENGTH)?;
    h.f_div(&lengths)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::model::ModelConfig;

    const CONFIG: &str = r#"{
        "architectures": ["Qwen2ForCausalLM"], "vocab_size": 300, "hidden_size": 32,
        "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 2, "head_dim": 8
    }"#;

    fn sampler() -> Sampler {
        let config = ModelConfig::parse(CONFIG, Path::new("config.json")).unwrap();
        Sampler::new(&Decoder::random(config, 3)).unwrap()
    }

    fn sequences(lengths: &[usize]) -> Vec<Vec<u32>> {
        let token = |at: usize, i: usize| ((at * 37 + i * 11 + i * i) % 300) as u32;
        let sequence = |(at, &length)| (0..length).map(|i| token(at, i)).collect();
        lengths.iter().enumerate().map(sequence).collect()
    }

    #[test]
    fn packing_changes_nothing() {
        let sampler = sampler();
        let all = sequences(&[5, 1, 700, 1400, 60, 2100, 9]);
        assert_eq!(passes(&all), [0..3, 3..5, 5..6, 6..7]);
        let mut done = Vec::new();
        let together = sampler.embed(&all, &mut |n| {
            done.push(n);
            ControlFlow::Continue(())
        });
        assert_eq!(done, [3, 5, 6, 7]);
        for (at, (one, embedding)) in all.iter().zip(together.unwrap()).enumerate() {
            let alone = sampler
                .embed(std::slice::from_ref(one), &mut |_| ControlFlow::Continue(()))
                .unwrap();
            let far = |(a, b): (&f32, &f32)| (a - b).abs() > 1e-5;
            assert_eq!(embedding.len(), 32);
            assert!(!embedding.iter().zip(&alone[0]).any(far), "sequence {at}");
            let length: f32 = embedding.iter().map(|x| x * x).sum();
            assert!((length - 1.0).abs() < 1e-5, "sequence {at} has length {length}");
        }
    }

    #[test]
    fn what_makes_no_sense_is_refused_and_a_stop_is_seen() {
        let sampler = sampler();
        let refused = |all: &[Vec<u32>]| {
            sampler.embed(all, &mut |_| ControlFlow::Continue(())).unwrap_err().to_string()
        };
        assert!(refused(&[vec![1], vec![]]).contains("sequence 1 has no tokens"));
        assert!(refused(&[vec![300]]).contains("sequence 0 holds token 300"));
        let stopped = sampler.embed(&sequences(&[1500, 1500]), &mut |_| ControlFlow::Break(()));
        assert!(matches!(stopped, Err(SampleError::Stopped)));
    }
}
