//! Which corpus each row of a batch comes from: stages one after another, in each a mixture.
//!
//! Within a stage rows are dealt out in proportion to the shares, always to the corpus furthest behind
//! its share: exact, and without chance. A corpus goes on where it was when it is named again in a
//! later stage.

use serde::{Deserialize, Serialize};

use super::windows::Windows;
use crate::batch::Batch;
use crate::error::{Error, Result};

/// A corpus of a mixture.
#[derive(Debug, Clone)]
pub struct Corpus {
    /// Its windows.
    pub windows: Windows,
}

/// How much of a stage's rows come from a corpus.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// The corpus, by its place in the list.
    pub corpus: usize,
    /// Its weight, above 0; a stage's weights need not add up to 1.
    pub weight: f64,
}

/// A part of a run with one mixture.
#[derive(Debug, Clone, PartialEq)]
pub struct Stage {
    /// The place in the run where the next stage begins, 0 to 1.
    pub until: f64,
    /// What it is mixed of.
    pub shares: Vec<Share>,
}

/// Where a mixture stands; enough to go on from there.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MixtureState {
    /// The stage the counts below belong to.
    pub stage: usize,
    /// Rows given out in this stage, for each of its shares.
    pub dealt: Vec<u64>,
    /// Windows used of each corpus, in all stages.
    pub used: Vec<u64>,
}

/// Rows of token windows, mixed.
#[derive(Debug, Clone)]
pub struct Mixture {
    corpora: Vec<Corpus>,
    stages: Vec<Stage>,
    state: MixtureState,
}

impl Mixture {
    /// Stages in order; the last goes on as long as rows are asked for.
    ///
    /// # Errors
    /// No stage, a stage without shares, weights that are not above 0, stages out of order.
    pub fn new(corpora: Vec<Corpus>, stages: Vec<Stage>) -> Result<Self> {
        if stages.is_empty() {
            return Err(Error::input("stages", "at least one", "none"));
        }
        for (i, stage) in stages.iter().enumerate() {
            let what = || format!("stage {}", i + 1);
            if stage.shares.is_empty() {
                return Err(Error::input(what(), "at least one corpus", "none"));
            }
            for share in &stage.shares {
                if !(share.weight > 0.0 && share.weight.is_finite()) {
                    return Err(Error::input(what(), "weights above 0", share.weight));
                }
                if share.corpus >= corpora.len() {
                    return Err(Error::input(what(), "a corpus that is there", share.corpus));
                }
            }
            let begin = if i > 0 { stages[i - 1].until } else { 0.0 };
            if !(stage.until > begin && stage.until <= 1.0) {
                let expected = format!("an end above {begin}, at most 1");
                return Err(Error::input(what(), expected, stage.until));
            }
        }
        let state = MixtureState {
            stage: 0,
            dealt: vec![0; stages[0].shares.len()],
            used: vec![0; corpora.len()],
        };
        Ok(Self { corpora, stages, state })
    }

    /// Where it stands.
    pub fn state(&self) -> &MixtureState {
        &self.state
    }

    /// Goes on from a state that [`state`](Self::state) gave.
    ///
    /// # Errors
    /// A state of other corpora or stages.
    pub fn restore(&mut self, state: MixtureState) -> Result<()> {
        let shares = self.stages.get(state.stage).map(|stage| stage.shares.len());
        if state.used.len() != self.corpora.len() || shares != Some(state.dealt.len()) {
            let expected = "the corpora and stages of the run it was saved by";
            return Err(Error::input("checkpoint", expected, "others"));
        }
        self.state = state;
        Ok(())
    }

    /// The corpora, in order.
    pub fn corpora(&self) -> &[Corpus] {
        &self.corpora
    }

    /// The stage at `progress`, 0 to 1; counted from 0.
    fn stage(&self, progress: f64) -> usize {
        let last = self.stages.len() - 1;
        self.stages.iter().position(|stage| progress < stage.until).unwrap_or(last)
    }

    /// A batch of `rows` windows for the place `progress` of the run, 0 to 1.
    ///
    /// # Errors
    /// A corpus in which nothing is to be predicted.
    pub fn next_batch(&mut self, progress: f64, rows: usize) -> Result<Batch> {
        let mut batch = Batch { tokens: Vec::new(), rows, len: 0, loss_mask: None };
        let mut counted = Vec::new();
        for _ in 0..rows {
            self.next_row(progress, &mut batch.tokens, &mut counted)?;
        }
        batch.len = counted.len() / rows.max(1);
        batch.loss_mask = counted.contains(&false).then_some(counted);
        Ok(batch)
    }

    /// Appends the next row to `ids` and `counted`, as [`Windows::read`] does. Windows in which
    /// nothing counts are passed over.
    fn next_row(
        &mut self,
        progress: f64,
        ids: &mut Vec<u32>,
        counted: &mut Vec<bool>,
    ) -> Result<()> {
        let stage = self.stage(progress);
        if stage != self.state.stage {
            self.state.stage = stage;
            self.state.dealt = vec![0; self.stages[stage].shares.len()];
        }
        let shares = &self.stages[stage].shares;
        let behind = |i: usize| (self.state.dealt[i] + 1) as f64 / shares[i].weight;
        let next = (0..shares.len()).min_by(|&a, &b| behind(a).total_cmp(&behind(b)));
        let next = next.expect("stages have shares, as `new` checked");
        self.state.dealt[next] += 1;
        let corpus = shares[next].corpus;
        let windows = &self.corpora[corpus].windows;
        // Each epoch has its own order: the next window that counts may be almost two of them away.
        for _ in 0..2 * windows.per_epoch() {
            let (before, flags) = (ids.len(), counted.len());
            let index = self.state.used[corpus];
            self.state.used[corpus] += 1;
            if windows.read(index, ids, counted) {
                return Ok(());
            }
            ids.truncate(before);
            counted.truncate(flags);
        }
        let expected = "windows with answers to learn from";
        Err(Error::input(windows.tokens().name().to_owned(), expected, "none"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::Tokens;

    /// Corpora whose tokens tell them apart: 0…, 1000…, 2000….
    fn mixture(stages: Vec<Stage>) -> Result<Mixture> {
        let corpus = |i: u32| {
            let ids: Vec<u32> = (i * 1000..i * 1000 + 401).collect();
            Corpus { windows: Windows::new(Tokens::in_memory("c", &ids), 4, 3).unwrap() }
        };
        Mixture::new((0..3).map(corpus).collect(), stages)
    }

    fn stage(until: f64, shares: &[(usize, f64)]) -> Stage {
        let shares = shares.iter().map(|&(corpus, weight)| Share { corpus, weight }).collect();
        Stage { until, shares }
    }

    /// First tokens of the rows `range` of a run of 80.
    fn rows(mixture: &mut Mixture, range: std::ops::Range<u32>) -> Vec<u32> {
        let row = |i| {
            let batch = mixture.next_batch(f64::from(i) / 80.0, 1).unwrap();
            assert_eq!((batch.tokens.len(), batch.len, batch.loss_mask), (5, 4, None));
            batch.tokens[0]
        };
        range.map(row).collect()
    }

    #[test]
    fn rows_keep_to_the_shares_and_stages() {
        let stages = vec![stage(0.5, &[(0, 3.0), (1, 1.0)]), stage(1.0, &[(2, 0.5), (1, 0.5)])];
        let mut mixture = mixture(stages).unwrap();
        let found = rows(&mut mixture, 0..80);
        let count = |part: &[u32], corpus| part.iter().filter(|&&id| id / 1000 == corpus).count();
        let first = &found[..40];
        assert_eq!([0, 1, 2].map(|c| count(first, c)), [30, 10, 0]);
        for four in first.chunks(4) {
            assert_eq!(count(four, 1), 1, "evenly");
        }
        assert_eq!([0, 1, 2].map(|c| count(&found[40..], c)), [0, 20, 20]);
        let mut of_one: Vec<u32> = found.into_iter().filter(|id| id / 1000 == 1).collect();
        of_one.sort_unstable();
        of_one.dedup();
        assert_eq!(of_one.len(), 30, "a corpus goes on where it was");
    }

    #[test]
    fn a_state_goes_on_with_the_same_rows() {
        let stages = || vec![stage(0.125, &[(0, 0.7), (1, 0.3)]), stage(0.5, &[(2, 1.0)])];
        let mut whole = mixture(stages()).unwrap();
        let expected = rows(&mut whole, 0..60);
        for cut in [1, 9, 10, 11, 50] {
            let mut first = mixture(stages()).unwrap();
            rows(&mut first, 0..cut);
            let json = serde_json::to_string(first.state()).unwrap();
            let mut second = mixture(stages()).unwrap();
            second.restore(serde_json::from_str(&json).unwrap()).unwrap();
            assert_eq!(rows(&mut second, cut..60), expected[cut as usize..]);
        }
        let mut other = mixture(vec![stage(1.0, &[(0, 1.0)])]).unwrap();
        assert!(other.restore(whole.state().clone()).is_err());
    }

    #[test]
    fn windows_without_answers_are_passed_over() {
        let silent = 1 << 31;
        let ids: Vec<u32> = (0..41).map(|i| if i == 22 { i } else { i | silent }).collect();
        let windows = Windows::new(Tokens::in_memory("chats", &ids), 4, 0).unwrap();
        let stages = vec![stage(1.0, &[(0, 1.0)])];
        let mut one = Mixture::new(vec![Corpus { windows }], stages.clone()).unwrap();
        let batch = one.next_batch(0.0, 3).unwrap();
        assert_eq!((batch.tokens.len(), batch.counted()), (15, 3));
        assert!(batch.check(41).is_ok());
        let ids: Vec<u32> = (0..41).map(|i| i | silent).collect();
        let windows = Windows::new(Tokens::in_memory("chats", &ids), 4, 0).unwrap();
        let mut none = Mixture::new(vec![Corpus { windows }], stages).unwrap();
        let error = none.next_batch(0.0, 1).unwrap_err().to_string();
        assert!(error.contains("chats: expected windows with answers"), "{error}");
    }

    #[test]
    fn nonsense_is_refused() {
        for (stages, expected) in [
            (vec![], "stages"),
            (vec![stage(1.0, &[])], "stage 1"),
            (vec![stage(1.0, &[(0, 0.0)])], "weights above 0"),
            (vec![stage(1.0, &[(0, f64::NAN)])], "weights above 0"),
            (vec![stage(1.0, &[(9, 1.0)])], "a corpus that is there"),
            (vec![stage(0.5, &[(0, 1.0)]), stage(0.5, &[(0, 1.0)])], "stage 2"),
            (vec![stage(1.5, &[(0, 1.0)])], "stage 1"),
        ] {
            let error = mixture(stages).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
