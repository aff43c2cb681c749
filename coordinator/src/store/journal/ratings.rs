//! What a reward model says of samples.

use std::path::Path;

use rusqlite::{Transaction, params};

use super::checked::{RowSum, failed, integer};
use super::{Journal, StoreError};
use crate::domain::{Iteration, PromptId, Ratings};

const RECORD: &str = "record ratings";

/// As [`Journal::record_ratings`], as a part of a transaction.
pub(super) fn put_ratings(
    transaction: &Transaction<'_>,
    path: &Path,
    iteration: Iteration,
    ratings: &Ratings,
) -> Result<(), StoreError> {
    let failed = failed(path, RECORD);
    let mut insert = transaction
        .prepare_cached("INSERT INTO ratings VALUES (?1, ?2, ?3, ?4, ?5) ON CONFLICT DO NOTHING")
        .map_err(&failed)?;
    for (&(prompt, index), rating) in ratings {
        let (prompt, rating) = (integer("prompt", prompt.0)?, rating.to_le_bytes());
        let sum = rating_sum(iteration, prompt, index, &rating);
        insert.execute(params![iteration.0, prompt, index, rating, sum]).map_err(&failed)?;
    }
    Ok(())
}

impl Journal {
    /// Records ratings, all or none; a sample that has its own already keeps it.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn record_ratings(
        &mut self,
        iteration: Iteration,
        ratings: &Ratings,
    ) -> Result<(), StoreError> {
        let failed = self.failed(RECORD);
        let path = self.path.clone();
        let transaction = self.connection.transaction().map_err(&failed)?;
        put_ratings(&transaction, &path, iteration, ratings)?;
        transaction.commit().map_err(&failed)
    }

    /// Ratings of an iteration's samples; every bit as recorded.
    ///
    /// # Errors
    /// [`StoreError::JournalDamaged`] naming the sample, or the operation that failed.
    pub fn ratings(&self, iteration: Iteration) -> Result<Ratings, StoreError> {
        let rows = self.rows(
            "read ratings",
            "SELECT prompt, sample, rating, sha256 FROM ratings WHERE iteration = ?1",
            [iteration.0],
            |row| {
                Ok((
                    row.get::<_, i64>(0)?,
                    row.get::<_, u32>(1)?,
                    row.get::<_, [u8; 8]>(2)?,
                    row.get::<_, Vec<u8>>(3)?,
                ))
            },
        )?;
        rows.into_iter()
            .map(|(prompt, index, rating, sum)| {
                self.check(rating_sum(iteration, prompt, index, &rating), &sum, || {
                    format!("rating of sample {index} of prompt {prompt}, iteration {iteration}")
                })?;
                let prompt = PromptId(prompt.cast_unsigned());
                Ok(((prompt, index), f64::from_le_bytes(rating)))
            })
            .collect()
    }

    /// Removes an iteration's ratings, for when they must be made anew.
    ///
    /// # Errors
    /// The operation that failed.
    pub fn discard_ratings(&mut self, iteration: Iteration) -> Result<(), StoreError> {
        self.connection
            .execute("DELETE FROM ratings WHERE iteration = ?1", [iteration.0])
            .map_err(self.failed("discard ratings"))?;
        Ok(())
    }
}

pub(super) fn rating_sum(
    iteration: Iteration,
    prompt: i64,
    index: u32,
    rating: &[u8; 8],
) -> [u8; 32] {
    RowSum::of("ratings")
        .integer(i64::from(iteration.0))
        .integer(prompt)
        .integer(i64::from(index))
        .bytes(rating)
        .finish()
}
