//! Numbers as people read them.

/// `3 min 12 s`: two units at most, the same for any locale.
pub fn seconds(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    if seconds < 9.95 {
        return format!("{seconds:.1} s");
    }
    let whole = seconds.round() as u64;
    match whole {
        0..60 => format!("{whole} s"),
        60..3600 => format!("{} min {:02} s", whole / 60, whole % 60),
        3600..86_400 => format!("{} h {:02} min", whole / 3600, whole % 3600 / 60),
        _ => format!("{} d {:02} h", whole / 86_400, whole % 86_400 / 3600),
    }
}

/// `10:04` or `1:23:45`: for columns of a table.
pub fn clock(seconds: f64) -> String {
    if !seconds.is_finite() || seconds < 0.0 {
        return "?".into();
    }
    let whole = seconds.round() as u64;
    let (hours, minutes, seconds) = (whole / 3600, whole % 3600 / 60, whole % 60);
    if hours == 0 {
        format!("{minutes}:{seconds:02}")
    } else {
        format!("{hours}:{minutes:02}:{seconds:02}")
    }
}

/// `269 MB`: decimal units, as disks and networks are sold.
pub fn bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["kB", "MB", "GB", "TB", "PB"];
    if bytes < 1000 {
        return format!("{bytes} B");
    }
    let mut value = bytes as f64;
    let mut unit = "B";
    for next in UNITS {
        // What would be printed as 1000 goes to the next unit.
        if value < 999.5 {
            break;
        }
        value /= 1000.0;
        unit = next;
    }
    if value < 9.95 { format!("{value:.1} {unit}") } else { format!("{value:.0} {unit}") }
}

/// `1,234,567`.
pub fn count(count: u64) -> String {
    let digits = count.to_string();
    let mut grouped = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            grouped.push(',');
        }
        grouped.push(digit);
    }
    grouped
}

/// A rate with three digits that matter: `0.42`, `61.3`, `4,132`.
pub fn rate(per_second: f64) -> String {
    match per_second {
        r if !r.is_finite() || r < 0.0 => "?".into(),
        r if r < 9.995 => format!("{r:.2}"),
        r if r < 99.95 => format!("{r:.1}"),
        r => count(r.round() as u64),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_change_units_without_a_seam() {
        let shown = [0.04, 9.94, 9.96, 59.4, 59.6, 3599.4, 3599.6, 86_399.0, 90_000.0, f64::NAN]
            .map(seconds);
        assert_eq!(
            shown,
            [
                "0.0 s",
                "9.9 s",
                "10 s",
                "59 s",
                "1 min 00 s",
                "59 min 59 s",
                "1 h 00 min",
                "23 h 59 min",
                "1 d 01 h",
                "?"
            ]
        );
    }

    #[test]
    fn clocks_have_hours_only_where_needed() {
        let shown = [0.4, 9.6, 604.4, 3599.6, 90_061.0].map(clock);
        assert_eq!(shown, ["0:00", "0:10", "10:04", "1:00:00", "25:01:01"]);
    }

    #[test]
    fn sizes_change_units_without_a_seam() {
        let shown =
            [0, 999, 1000, 9949, 9950, 999_499, 999_500, 269_060_552, 29_500_000_000].map(bytes);
        assert_eq!(
            shown,
            ["0 B", "999 B", "1.0 kB", "9.9 kB", "10 kB", "999 kB", "1.0 MB", "269 MB", "30 GB"]
        );
    }

    #[test]
    fn counts_are_grouped_and_rates_keep_three_digits() {
        assert_eq!([0, 999, 1000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        let shown = [0.0, 0.417, 9.994, 9.996, 61.34, 99.96, 4132.4, f64::INFINITY].map(rate);
        assert_eq!(shown, ["0.00", "0.42", "9.99", "10.0", "61.3", "100", "4,132", "?"]);
    }
}
