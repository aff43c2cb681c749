//! What a coordinator's log says has happened.

/// The place in the run's story that a line tells of: without its time, and without
/// numbers that depend on the clock.
pub(crate) fn place(line: &str) -> Option<String> {
    let text = line.split(" INFO ").nth(1)?;
    let until = |stop: &str| text.split(stop).next().unwrap_or(text).trim().to_owned();
    if text.starts_with("begin ") {
        return Some(until(" total="));
    }
    if text.starts_with("committed ") {
        return Some(text.trim().to_owned());
    }
    if text.starts_with("iteration ") && text.contains("  loss ") {
        return Some(until("  loss"));
    }
    if text.starts_with("worker attached ") {
        return Some(until(" about="));
    }
    None
}

/// Rank and process id of a worker that attached.
pub(crate) fn attached(line: &str) -> Option<(u32, u32)> {
    let after = |mark: &str| {
        let rest = line.split(mark).nth(1)?;
        rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    line.contains("worker attached ").then(|| Some((after("rank=")?, after("(pid ")?)))?
}

/// Whether a coordinator waits for workers that it does not start.
pub(crate) fn calls_for_workers(line: &str) -> bool {
    line.contains(" wait for workers")
}

/// Whether it tells that a worker is lost and replaced; its rank.
pub(crate) fn lost(line: &str) -> Option<u32> {
    let rest = line.split("worker lost; it is replaced rank=").nth(1)?;
    rest.split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
}

/// Whether it tells of a training step.
pub(crate) fn is_step(line: &str) -> bool {
    place(line).is_some_and(|place| place.contains(" step "))
}

/// The phase that begins with a line.
pub(crate) fn phase(line: &str) -> Option<String> {
    let rest = line.split(" begin iteration=").nth(1)?.split("phase=").nth(1)?;
    Some(rest.split_whitespace().next()?.to_owned())
}
