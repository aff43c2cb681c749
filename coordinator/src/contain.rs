//! A library's panic over a damaged file, made an error.
//!
//! Parquet's decoders refuse most damage by errors, and some by a panic (found by
//! `make fuzz`). Nothing of ours belongs in here: a panic of our own is a bug to be seen.

use std::cell::Cell;
use std::fmt::Display;
use std::panic::{AssertUnwindSafe, catch_unwind, set_hook, take_hook};
use std::sync::Once;

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Runs `body`, and gives its error, or its panic's words, as text. What `body` borrows is
/// not to be used again after an error.
pub(crate) fn contained<R, E: Display>(body: impl FnOnce() -> Result<R, E>) -> Result<R, String> {
    static QUIET: Once = Once::new();
    QUIET.call_once(|| {
        let others = take_hook();
        set_hook(Box::new(move |panic| {
            if !CONTAINED.get() {
                others(panic);
            }
        }));
    });
    CONTAINED.set(true);
    let ended = catch_unwind(AssertUnwindSafe(body));
    CONTAINED.set(false);
    match ended {
        Ok(result) => result.map_err(|error| error.to_string()),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().map(String::as_str);
            let text = text.or_else(|| panic.downcast_ref::<&str>().copied());
            Err(format!("its decoder gave up: {}", text.unwrap_or("it did not say why")))
        }
    }
}

/// The items of `iterator`, each made by [`contained`]; none after the first error.
pub(crate) fn items<T, E: Display>(
    iterator: impl Iterator<Item = Result<T, E>>,
) -> impl Iterator<Item = Result<T, String>> {
    let mut left = Some(iterator);
    std::iter::from_fn(move || {
        let iterator = left.as_mut()?;
        let item = contained(|| iterator.next().transpose());
        if item.is_err() {
            left = None;
        }
        item.transpose()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_panic_is_an_error_and_the_end() {
        let numbers = [4_u32, 0, 2].into_iter().map(|n| Ok::<_, String>(8_u32.div_euclid(n)));
        let items: Vec<_> = items(numbers).collect();
        assert_eq!(items.len(), 2);
        assert_eq!(items[0], Ok(2));
        assert!(matches!(&items[1], Err(words) if words.contains("divide by zero")), "{items:?}");
        assert_eq!(contained(|| Err::<(), _>("torn")), Err("torn".to_owned()));
    }
}
