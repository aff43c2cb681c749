//! Values that settings take.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

macro_rules! choice {
    ($(#[$doc:meta])* $name:ident { $( $(#[$variant_doc:meta])* $variant:ident = $text:literal ),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
        pub enum $name {
            $( $(#[$variant_doc])* #[serde(rename = $text)] $variant, )+
        }
    };
}

choice! {
    /// Which preference method builds the pairs.
    Method {
        /// Chosen: a fresh sample. Rejected: the reply that disappointed.
        Drift = "drift",
        /// Chosen: the reply that satisfied. Rejected: a fresh sample.
        Spin = "spin",
        /// Chosen: a guided sample. Rejected: an unguided one. Where nothing guides, the
        /// better and the worse of two by a reward model.
        IterDpo = "iter-dpo",
    }
}

impl fmt::Display for Method {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Drift => "drift",
            Self::Spin => "spin",
            Self::IterDpo => "iter-dpo",
        })
    }
}

choice! {
    /// What becomes of a pair that is longer than the bounds on tokens.
    Overlong {
        /// Prompts lose their start, replies their end.
        Cut = "cut",
        /// It is left out, and counted.
        Drop = "drop",
    }
}

choice! {
    /// Whether sampling sees the complaint.
    Guidance {
        /// The whole conversation and the instruction to improve.
        On = "on",
        /// The bare prompt.
        Off = "off",
    }
}

choice! {
    /// What follows when a shard takes its worker with it each time.
    PoisonShard {
        /// The run ends.
        Stop = "stop",
        /// The run goes on without its prompts.
        Skip = "skip",
    }
}

choice! {
    /// Shape of the learning rate after the warm-up.
    Schedule {
        /// Falls to 0 in a straight line.
        Linear = "linear",
        /// Falls to 0 in half a cosine.
        Cosine = "cosine",
        /// Stays at the peak.
        Constant = "constant",
    }
}

choice! {
    /// The reference policy π_ref.
    Reference {
        /// The policy at the iteration's start.
        Iteration = "iteration",
        /// The model that the run began with.
        Initial = "initial",
    }
}

choice! {
    /// How a pair's margin becomes a loss, under TRL's names.
    Loss {
        /// DPO.
        Sigmoid = "sigmoid",
        /// SLiC's, with DPO's margin.
        Hinge = "hinge",
        /// IPO, by means over tokens.
        Ipo = "ipo",
        /// DPO for labels of which a known share is flipped.
        Robust = "robust",
        /// DPO by means over tokens.
        SigmoidNorm = "sigmoid_norm",
    }
}

choice! {
    /// How gradients become updates.
    OptimizerChoice {
        /// As `torch.optim.RMSprop`.
        RmsProp = "rmsprop",
        /// As `torch.optim.AdamW`.
        AdamW = "adamw",
    }
}

choice! {
    /// What each worker holds of gradients, masters and optimiser state.
    Sharding {
        /// All of it.
        None = "none",
        /// A share.
        Zero2 = "zero2",
    }
}

choice! {
    /// What a block keeps between forward and backward.
    Recompute {
        /// All that backward needs.
        None = "none",
        /// Its input alone.
        All = "all",
        /// All in as many blocks as a budget allows.
        Auto = "auto",
    }
}

choice! {
    /// Compute type of weights and activations.
    DType {
        /// 16-bit brain floats.
        Bf16 = "bf16",
        /// 32-bit floats.
        F32 = "f32",
    }
}

choice! {
    /// Kind of device workers compute on.
    DeviceChoice {
        /// A GPU per worker where the build and the machine have them, else the CPU.
        Auto = "auto",
        /// The CPU.
        Cpu = "cpu",
        /// GPU N for worker N.
        Cuda = "cuda",
    }
}

choice! {
    /// Who starts the workers.
    StartWorkers {
        /// The coordinator, on its own machine.
        Local = "local",
        /// The coordinator, on the nodes of the Slurm job that it is part of.
        Slurm = "slurm",
        /// Somebody else; the coordinator waits for them.
        None = "none",
    }
}

choice! {
    /// Where the wire has TLS.
    Tls {
        /// On every address but loopback.
        Auto = "auto",
        /// On loopback too.
        Always = "always",
    }
}

choice! {
    /// Shape of log lines.
    LogFormat {
        /// For people.
        Text = "text",
        /// One JSON object a line.
        Json = "json",
    }
}

/// A number of bytes, written as people do: `"8GiB"`, `"512 MiB"`, or a plain number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ByteSize(pub u64);

impl ByteSize {
    const UNITS: [(&str, u32); 5] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10), ("B", 0)];

    /// So many GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n << 30)
    }
}

impl fmt::Display for ByteSize {
    /// In the largest unit that divides it.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let divides = |shift: u32| self.0.trailing_zeros() >= shift;
        match Self::UNITS.iter().find(|(_, shift)| self.0 > 0 && divides(*shift)) {
            Some((unit, shift)) => write!(f, "{}{unit}", self.0 >> shift),
            None => write!(f, "{}B", self.0),
        }
    }
}

impl FromStr for ByteSize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let no_size = || format!("{text:?} is no size; write a number and KiB, MiB, GiB or TiB");
        let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
        let unit = text[digits.len()..].trim();
        let named = |name: &str| {
            unit.eq_ignore_ascii_case(name)
                || (name != "B" && unit.eq_ignore_ascii_case(&name[..1]))
        };
        let shift = match Self::UNITS.iter().find(|(name, _)| named(name)) {
            Some((_, shift)) => *shift,
            None if unit.is_empty() => 0,
            None => return Err(no_size()),
        };
        let number: u64 = digits.trim().parse().map_err(|_| no_size())?;
        number.checked_mul(1 << shift).map(Self).ok_or_else(no_size)
    }
}

impl Serialize for ByteSize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for ByteSize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a size such as \"8GiB\", or a number of bytes")]
        enum Shape {
            Bytes(u64),
            Text(String),
        }
        match Shape::deserialize(deserializer)? {
            Shape::Bytes(bytes) => Ok(Self(bytes)),
            Shape::Text(text) => text.parse().map_err(serde::de::Error::custom),
        }
    }
}

/// One value or a list of them.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(transparent)]
pub struct OneOrMany(pub Vec<String>);

impl<'de> Deserialize<'de> for OneOrMany {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a path or a list of paths")]
        enum Shape {
            One(String),
            Many(Vec<String>),
        }
        Ok(match Shape::deserialize(deserializer)? {
            Shape::One(one) if one.is_empty() => Self::default(),
            Shape::One(one) => Self(vec![one]),
            Shape::Many(many) => Self(many),
        })
    }
}

/// How many pairs are held out of training.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
#[serde(untagged)]
pub enum HeldOutSetting {
    /// This many.
    Pairs(u64),
    /// This share of the set, below 1.
    Share(f64),
}

impl<'de> Deserialize<'de> for HeldOutSetting {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "a count such as 100 or a share such as 0.05")]
        enum Shape {
            Count(u64),
            Number(f64),
        }
        match Shape::deserialize(deserializer)? {
            Shape::Count(n) => Ok(Self::Pairs(n)),
            Shape::Number(share) if (0.0..1.0).contains(&share) => Ok(Self::Share(share)),
            Shape::Number(other) => Err(serde::de::Error::custom(format!(
                "held_out = {other}: a share lies between 0 and 1; write a count without a decimal point"
            ))),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_as_people_write_them() {
        for (text, bytes) in [
            ("8GiB", 8 << 30),
            ("512 MiB", 512 << 20),
            ("3g", 3 << 30),
            ("1KIB", 1 << 10),
            ("17", 17),
            ("17B", 17),
            ("0", 0),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for text in ["", "GiB", "8GB", "-1GiB", "1.5GiB", "99999999999TiB"] {
            assert!(text.parse::<ByteSize>().unwrap_err().contains("is no size"), "{text}");
        }
    }

    #[test]
    fn a_size_shows_in_the_largest_unit_that_divides_it() {
        for (bytes, text) in [
            (8 << 30, "8GiB"),
            (1536 << 20, "1536MiB"),
            (1 << 50, "1024TiB"),
            (1001, "1001B"),
            (0, "0B"),
        ] {
            assert_eq!(ByteSize(bytes).to_string(), text);
            assert_eq!(text.parse(), Ok(ByteSize(bytes)));
        }
    }
}
