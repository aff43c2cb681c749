//! As many short conversations as asked for, no two alike.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;

const SENTENCES: [&str; 8] = [
    "Please keep it short.",
    "It is for a class of ten-year-olds.",
    "Nothing that needs an oven, and nothing with nuts.",
    "I tried the obvious thing twice and it made no difference at all.",
    "My neighbour says that it cannot be done, and I should like to know why.",
    "There is a train at seven, so there is not much time.",
    "Write it as a letter to somebody who has never heard of the place before.",
    "I have a spare afternoon, a bicycle, two old maps and a camera that works half of the time.",
];

/// Writes conversations that end in a complaint, one a line.
pub(crate) fn write(path: &Path, conversations: u64) -> Result<()> {
    let mut file = BufWriter::new(File::create(path).context("write the corpus")?);
    for n in 0..conversations {
        let mut dice = n.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let prompt = (0..1 + (dice >> 63)).fold(format!("Question {n}."), |text, _| {
            dice = dice.rotate_left(11).wrapping_mul(0x2545_F491_4F6C_DD1D);
            text + " " + SENTENCES[(dice >> 61) as usize]
        });
        let line = json!({
            "prompt": prompt,
            "rejected": "I can help with that. What would you like to know?",
            "user_preference": "I have told you; answer the question.",
        });
        writeln!(file, "{line}").context("write the corpus")?;
    }
    file.flush().context("write the corpus")
}
