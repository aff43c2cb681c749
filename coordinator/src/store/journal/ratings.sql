-- What a reward model says of samples; higher is better. As BLOB, every bit as it came.
CREATE TABLE ratings (
    iteration INTEGER NOT NULL,
    prompt INTEGER NOT NULL,
    sample INTEGER NOT NULL,               -- its index, as in the table of them
    rating BLOB NOT NULL,                  -- f64, little-endian
    sha256 BLOB NOT NULL,
    PRIMARY KEY (iteration, prompt, sample)
) STRICT;
