-- Integers are signed 64-bit. Every `sha256` is over its row's other columns
-- (of `shards`: over the shard's samples), so that a flipped bit is found
-- where it is read.

CREATE TABLE run (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    run_id TEXT NOT NULL,
    config_sha256 TEXT NOT NULL,
    created_at REAL NOT NULL,              -- seconds since 1970
    drift_version TEXT NOT NULL,           -- the version that began the run
    sha256 BLOB NOT NULL
) STRICT;

-- Rises by one each time the membership is formed; fences what is stale.
CREATE TABLE generation (
    id INTEGER PRIMARY KEY CHECK (id = 1),
    value INTEGER NOT NULL
) STRICT;
INSERT INTO generation VALUES (1, 0);

-- One row for each arrow of the run, in order.
CREATE TABLE commits (
    seq INTEGER PRIMARY KEY,               -- from 1, without gaps
    iteration INTEGER NOT NULL,
    phase TEXT NOT NULL,
    epoch INTEGER,
    at REAL NOT NULL,                      -- seconds since 1970
    detail TEXT NOT NULL,                  -- JSON
    sha256 BLOB NOT NULL
) STRICT;
CREATE UNIQUE INDEX commits_once ON commits (iteration, phase, ifnull(epoch, -1));

-- What the corpus and the pairs came to, and with how many workers each start
-- of the run went on.
CREATE TABLE counts (
    kind TEXT PRIMARY KEY,
    json TEXT NOT NULL,
    sha256 BLOB NOT NULL
) STRICT;

CREATE TABLE shards (
    iteration INTEGER NOT NULL,
    shard INTEGER NOT NULL,
    samples INTEGER NOT NULL,
    sha256 BLOB NOT NULL,
    PRIMARY KEY (iteration, shard)
) STRICT;

CREATE TABLE samples (
    iteration INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    sample INTEGER NOT NULL,               -- index among the prompt's samples
    shard INTEGER NOT NULL,
    tokens BLOB NOT NULL,                  -- u32, little-endian
    finish TEXT NOT NULL,                  -- stop or length
    PRIMARY KEY (iteration, prompt, sample),
    FOREIGN KEY (iteration, shard) REFERENCES shards (iteration, shard)
) STRICT;

-- Log-probabilities under the reference policy. As BLOB, because REAL turns
-- -0.0 into 0.0 and NaN into NULL.
CREATE TABLE reference (
    iteration INTEGER NOT NULL,
    pair INTEGER NOT NULL,
    chosen BLOB NOT NULL,                  -- f64, little-endian
    rejected BLOB NOT NULL,                -- f64, little-endian
    sha256 BLOB NOT NULL,
    PRIMARY KEY (iteration, pair)
) STRICT;

CREATE TABLE steps (
    iteration INTEGER NOT NULL,
    step INTEGER NOT NULL,
    epoch INTEGER NOT NULL,
    metrics TEXT NOT NULL,                 -- JSON
    sha256 BLOB NOT NULL,
    PRIMARY KEY (iteration, step)
) STRICT;
