//! Corpora: real files and generated ones of real size.
//!
//! The expected numbers were counted by a script of a few lines that loads each
//! file whole, not by the readers that are tested.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use drift_coordinator::corpus::{
    Container, Counts, DropReason, Format, Kind, ReadOptions, Record, Report, read,
};
use drift_coordinator::domain::{DsatSample, Message};

use crate::support::{data, root};

fn take(path: &Path) -> (Counts, Vec<Record>) {
    let mut records = Vec::new();
    let counts =
        read(path, &ReadOptions::default(), &mut |_| {}, &mut |record| records.push(record))
            .unwrap();
    (counts, records)
}

fn dsat(records: &[Record]) -> Vec<&DsatSample> {
    records
        .iter()
        .filter_map(|record| match record {
            Record::Dsat(sample) => Some(sample),
            _ => None,
        })
        .collect()
}

fn kept(counts: &Counts) -> [u64; 3] {
    [Kind::Dsat, Kind::Sat, Kind::Seed].map(|kind| counts.kept(kind))
}

#[test]
fn annotated_utterances_give_what_an_independent_count_gives() {
    let (counts, records) = take(&data("sat_dsat_annotation.json"));
    assert_eq!((counts.format, counts.container), (Format::Utterances, Container::JsonArray));
    assert_eq!((counts.conversations, counts.utterances, counts.records), (1503, 9062, 9062));
    assert_eq!((counts.labels.dsat, counts.labels.sat, counts.labels.mixed), (559, 34, 0));
    assert_eq!(counts.labels.neither, 4531 - 559 - 34);
    assert_eq!(counts.malformed, 0);
    // 16 of them repeat the context and the reply of an earlier one.
    assert_eq!(kept(&counts), [559 - 16, 34, 8]);
    assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::Duplicate), 16);
    assert_eq!(counts.dropped(Kind::Sat) + counts.dropped(Kind::Seed), 0);
    assert_eq!(records.len(), 543 + 34 + 8);
}

#[test]
fn the_paper_file_holds_the_dsat_turns_of_the_annotation() {
    let (_, annotated) = take(&data("sat_dsat_annotation.json"));
    let (counts, published) = take(&data("dsat_data.jsonl"));
    assert_eq!((counts.format, counts.container), (Format::Dsat, Container::JsonLines));
    assert_eq!((counts.records, counts.labels.dsat), (559, 559));
    assert_eq!(counts.dropped_for(Kind::Dsat, DropReason::Duplicate), 16);
    let words = |sample: &DsatSample| -> (Vec<Message>, String, String) {
        (sample.context.clone(), sample.rejected.clone(), sample.feedback.clone())
    };
    let ours: Vec<_> = dsat(&annotated).into_iter().map(words).collect();
    let theirs: Vec<_> = dsat(&published).into_iter().map(words).collect();
    // Prompt, reply and preference, in the same order: no difference to explain.
    assert_eq!(ours, theirs);
    assert_eq!(ours.len(), 543);
}

#[test]
fn pairs_are_seed_pairs() {
    let (counts, _) = take(&data("wildfeedback.json"));
    assert_eq!((counts.format, counts.records), (Format::Pairs, 192));
    assert_eq!(kept(&counts), [0, 0, 189]);
    assert_eq!(counts.dropped_for(Kind::Seed, DropReason::Duplicate), 3);

    let (counts, _) = take(&data("ultrafeedback_binarized.parquet"));
    assert_eq!(
        (counts.format, counts.container, counts.records),
        (Format::Pairs, Container::Parquet, 888)
    );
    assert_eq!(kept(&counts), [0, 0, 760]);
    assert_eq!(counts.dropped_for(Kind::Seed, DropReason::EmptyReply), 52);
    assert_eq!(counts.dropped_for(Kind::Seed, DropReason::Duplicate), 888 - 52 - 760);
}

#[test]
fn a_report_sets_files_side_by_side() {
    let paths = ["sat_dsat_annotation.json", "wildfeedback.json"].map(data);
    let mut files = BTreeSet::new();
    let counts =
        drift_coordinator::corpus::report(&paths, &ReadOptions::default(), &mut |file, _| {
            files.insert(file);
        })
        .unwrap();
    assert_eq!(files.len(), 2);
    let table = Report(&counts).to_string();
    let row = |name: &str| -> Vec<String> {
        let line = table.lines().find(|line| line.trim_start().starts_with(name)).unwrap();
        line.trim_start()[name.len()..].split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(row("seed pairs"), ["8", "189", "197"], "{table}");
    assert_eq!(
        row("utterances"),
        ["9,062", &spaced(counts[1].utterances), &spaced(9062 + counts[1].utterances)]
    );
}

fn spaced(number: u64) -> String {
    if number < 1000 {
        number.to_string()
    } else {
        format!("{},{:03}", number / 1000, number % 1000)
    }
}

/// Bytes of WildFeedback's `sat_dsat_annotation.json`.
const WILD: u64 = 1_600_000_000;
/// Peak of resident memory that its reading may take.
const MEMORY_KIB: u64 = 300 * 1024;
/// Floor of its reading speed, in MB per second of processor time: wall time
/// would measure the neighbours too.
const SPEED: f64 = 100.0;

/// The real utterances over and over, each copy's conversations told apart by
/// its number, so that nothing in the large file is a duplicate of another copy.
fn write_wild(path: &Path) -> u64 {
    const PLACE: &str =
        "\"UtterranceId\": 0,\n\"TurnId\": 1,\n\"Role\": \"User\",\n\"Content\": \"";
    let text = fs::read_to_string(data("sat_dsat_annotation.json")).unwrap();
    let inside = text.trim().strip_prefix('[').unwrap().strip_suffix(']').unwrap();
    assert_eq!(inside.matches(PLACE).count(), 1503);
    let mut file = BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    let (mut copies, mut bytes) = (0, 0);
    while bytes < WILD {
        let copy = inside.replace(PLACE, &format!("{PLACE}(copy {copies}) "));
        write!(file, "{}{copy}", if copies == 0 { "[" } else { "," }).unwrap();
        bytes += copy.len() as u64 + 1;
        copies += 1;
    }
    file.write_all(b"]\n").unwrap();
    file.flush().unwrap();
    copies
}

/// Peak resident memory of a running process, in KiB.
fn peak_kib(pid: u32) -> Option<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

/// Processor time of a running process, user and system, in seconds.
fn cpu_seconds(pid: u32) -> Option<f64> {
    // Fields 14 and 15 count from the start; the name, field 2, ends with `)`.
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace().skip(11);
    let ticks: f64 = fields.next()?.parse::<f64>().ok()? + fields.next()?.parse::<f64>().ok()?;
    // Linux counts in hundredths for every program (USER_HZ).
    Some(ticks / 100.0)
}

fn coordinator() -> PathBuf {
    let program = root().join("target/release/coordinator");
    assert!(
        program.exists(),
        "run `cargo build --release` first: {} is missing",
        program.display()
    );
    program
}

#[test]
fn a_file_of_real_size_streams_through_the_program() {
    let room = tempfile::tempdir_in(root().join("target")).unwrap();
    let path = room.path().join("wild.json");
    let copies = write_wild(&path);
    let bytes = fs::metadata(&path).unwrap().len();

    let begun = Instant::now();
    let mut child = Command::new(coordinator())
        .arg("data")
        .arg(&path)
        .arg("--json")
        .stdout(File::create(room.path().join("out")).unwrap())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    // The kernel keeps the high-water mark, so a poll misses nothing but the last moment.
    let (mut peak, mut cpu) = (0, 0.0_f64);
    let status = loop {
        peak = peak_kib(child.id()).unwrap_or(peak).max(peak);
        cpu = cpu_seconds(child.id()).unwrap_or(cpu).max(cpu);
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        assert!(
            begun.elapsed() < Duration::from_secs(300),
            "reading {bytes} bytes takes more than 5 minutes"
        );
        std::thread::sleep(Duration::from_millis(2));
    };
    let seconds = begun.elapsed().as_secs_f64();
    let output = child.wait_with_output().unwrap();
    assert!(status.success(), "{}", String::from_utf8_lossy(&output.stderr));

    let counts: Vec<Counts> =
        serde_json::from_slice(&fs::read(room.path().join("out")).unwrap()).unwrap();
    let counts = &counts[0];
    assert_eq!((counts.bytes, counts.records, counts.malformed), (bytes, 9062 * copies, 0));
    assert_eq!((counts.conversations, counts.utterances), (1503 * copies, 9062 * copies));
    assert_eq!((counts.labels.dsat, counts.labels.sat), (559 * copies, 34 * copies));
    assert_eq!(kept(counts), [543 * copies, 34 * copies, 8 * copies]);

    let megabytes = bytes as f64 / 1e6;
    let speed = megabytes / cpu;
    eprintln!(
        "{bytes} bytes: {seconds:.2} s, {:.0} MB/s; {cpu:.2} s of processor time, {speed:.0} MB/s; peak {} MiB",
        megabytes / seconds,
        peak / 1024
    );
    assert!(peak > 0 && peak < MEMORY_KIB, "peak of {peak} KiB");
    assert!(speed >= SPEED, "{speed:.0} MB/s");
}
