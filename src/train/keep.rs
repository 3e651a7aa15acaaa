//! Which files a run writes and which older ones it gives up: names and numbers, no disk.

use super::modules::Modules;
use super::reader::Reader;
use crate::dtype::Float;
use serde::{Deserialize, Serialize};
use serde_json::{json, Map, Value};

/// When files may be due.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// After a call of `step`.
    Step,
    /// After the last step of an epoch.
    Epoch,
    /// After the last step of all.
    End,
}

/// Why a file was written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Kind {
    /// So many updates were done.
    Step(u64),
    /// So many epochs were done.
    Epoch(u64),
    /// No value was less before.
    Best,
    /// The run is over.
    Final,
}

/// What is written for it, a file each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    Adapter,
    /// The adapter cut to so many ranks.
    Ranks(usize),
    /// A resume file.
    State,
}

/// A file that may be given up later.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    pub(super) file: String,
    pub(super) kind: Kind,
    /// A resume file; else an adapter.
    pub(super) state: bool,
}

/// What a run has to remember of its files, also when it is taken up by another process.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Run {
    /// Epochs done.
    pub(super) epoch: u64,
    /// The least value so far.
    pub(super) best: Option<f64>,
    /// In the order in which they were written.
    pub(super) files: Vec<Kept>,
}

impl Run {
    /// A file was written, perhaps once more.
    pub(super) fn note(&mut self, kept: Kept) {
        self.files.retain(|other| other.file != kept.file);
        self.files.push(kept);
    }
}

/// How often files are written, and how long they stay.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Rhythm {
    every: Option<u64>,
    last: Option<u64>,
    last_state: Option<u64>,
}

/// The options of saving.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Saving {
    /// The folder; without it nothing is written but by `save`.
    pub(super) dir: Option<String>,
    steps: Rhythm,
    epochs: Rhythm,
    /// Of adapters that go, cut to them, beside every adapter.
    ranks: Vec<usize>,
    /// Whether a resume file goes beside every adapter.
    state: bool,
    best: bool,
    /// Of the adapter files.
    pub(crate) precision: Float,
}

/// The option of the cut adapters.
const RANKS: &str = "save_ranks";
const PRECISIONS: [(&str, Float); 4] =
    [("float", Float::F32), ("fp32", Float::F32), ("fp16", Float::F16), ("bf16", Float::BF16)];

impl Saving {
    /// Takes the options of saving; `name` is the adapter's.
    pub(super) fn read(read: &mut Reader, name: Option<&str>, modules: &Modules) -> Saving {
        let mut rhythm = |every, last, last_state| Rhythm {
            every: read.whole(every, (1, u64::MAX)),
            last: read.whole(last, (1, u64::MAX)),
            last_state: read.whole(last_state, (1, u64::MAX)),
        };
        let steps = rhythm("save_every_n_steps", "save_last_n_steps", "save_last_n_steps_state");
        let epochs = rhythm("save_every_n_epochs", "save_last_n_epochs", "save_last_n_epochs_state");
        let saving = Saving {
            dir: read.text("output_dir"),
            steps,
            epochs,
            ranks: modules.ranks(read, RANKS),
            state: read.flag("save_state").unwrap_or(false),
            best: read.flag("save_best").unwrap_or(false),
            precision: read.choice("save_precision", &PRECISIONS).unwrap_or(Float::F32),
        };
        for (unit, Rhythm { every, last, last_state }) in [("steps", steps), ("epochs", epochs)] {
            for (given, option) in [(last, ""), (last_state, "_state")] {
                if given.is_some() && every.is_none() {
                    read.problem(format!("`save_last_n_{unit}{option}` needs save_every_n_{unit}"));
                }
            }
            if last_state.is_some() && !saving.state {
                read.problem(format!("`save_last_n_{unit}_state` needs save_state"));
            }
        }
        if !saving.ranks.is_empty() && read.get("dim_from_weights") == Some(&json!(true)) {
            read.problem(format!("`{RANKS}` needs ranks of these options, not those of dim_from_weights"));
        }
        let asked = [
            ("save_every_n_steps", steps.every.is_some()),
            ("save_every_n_epochs", epochs.every.is_some()),
            ("save_state", saving.state),
            ("save_best", saving.best),
            (RANKS, !saving.ranks.is_empty()),
        ];
        if read.get("output_dir").is_none() {
            let asked = asked.iter().filter(|(_, asked)| *asked);
            asked.for_each(|(option, _)| read.problem(format!("`{option}` needs output_dir")));
        }
        if saving.dir.is_some() {
            match name {
                None if read.get("output_name").is_none() => {
                    read.problem("`output_dir` needs output_name".into())
                }
                Some(text) if text.is_empty() || text.contains(['/', '\\', '\0']) => {
                    read.wrong("output_name", &json!(text), "the beginning of a file's name")
                }
                _ => {}
            }
        }
        saving
    }

    /// Writes the options as `read` takes them.
    pub(super) fn write(&self, map: &mut Map<String, Value>) {
        let precision = PRECISIONS.iter().find(|(_, float)| *float == self.precision);
        map.insert("save_precision".into(), json!(precision.map(|(name, _)| name)));
        if let Some(dir) = &self.dir {
            map.insert("output_dir".into(), json!(dir));
        }
        for (unit, rhythm) in [("steps", self.steps), ("epochs", self.epochs)] {
            let options = [
                ("every", rhythm.every, ""),
                ("last", rhythm.last, ""),
                ("last", rhythm.last_state, "_state"),
            ];
            for (option, value, end) in options {
                if let Some(value) = value {
                    map.insert(format!("save_{option}_n_{unit}{end}"), json!(value));
                }
            }
        }
        if !self.ranks.is_empty() {
            map.insert(RANKS.into(), json!(self.ranks));
        }
        for (option, value) in [("save_state", self.state), ("save_best", self.best)] {
            if value {
                map.insert(option.into(), json!(true));
            }
        }
    }

    /// What is written whenever an adapter is, the state last, so that it knows of the others.
    pub(super) fn parts(&self) -> impl Iterator<Item = Part> + '_ {
        let ranks = self.ranks.iter().map(|&rank| Part::Ranks(rank));
        [Part::Adapter].into_iter().chain(ranks).chain(self.state.then_some(Part::State))
    }

    /// The files due at a moment, the best one first so that the others' states know of it. `steps` counts the updates; `between` says that
    /// none is half accumulated. A value that is no number is none.
    pub(super) fn due(&self, moment: Moment, steps: u64, between: bool, value: f64, run: &Run) -> Vec<Kind> {
        let due =
            |rhythm: Rhythm, count: u64| count > 0 && rhythm.every.is_some_and(|every| count % every == 0);
        let better = value.is_finite() && run.best.is_none_or(|best| value < best);
        let mut kinds = Vec::new();
        if self.best && better {
            kinds.push(Kind::Best);
        }
        match moment {
            Moment::Step if between && due(self.steps, steps) => kinds.push(Kind::Step(steps)),
            Moment::Epoch if due(self.epochs, run.epoch) => kinds.push(Kind::Epoch(run.epoch)),
            Moment::End => kinds.push(Kind::Final),
            _ => {}
        }
        kinds
    }

    /// The files that newer ones have put out of date, by sd-scripts' rules: of the steps those within `last` steps of the newest stay, of
    /// the epochs the newest `last`. States have their own numbers, or those of the adapters.
    pub(super) fn outdated(&self, files: &[Kept]) -> Vec<Kept> {
        let mut old = Vec::new();
        for state in [false, true] {
            let last = |rhythm: Rhythm| match state {
                true => rhythm.last_state.or(rhythm.last),
                false => rhythm.last,
            };
            let of = |number: fn(Kind) -> Option<u64>| {
                let numbered = files.iter().filter(move |f| f.state == state);
                let mut numbered: Vec<_> = numbered.filter_map(|f| Some((number(f.kind)?, f))).collect();
                numbered.sort_by_key(|(number, _)| std::cmp::Reverse(*number));
                numbered
            };
            let steps = of(|kind| if let Kind::Step(n) = kind { Some(n) } else { None });
            if let (Some(last), Some((newest, _))) = (last(self.steps), steps.first()) {
                let least = newest.saturating_sub(last);
                old.extend(steps.iter().filter(|(n, _)| *n < least).map(|(_, f)| (*f).clone()));
            }
            let epochs = of(|kind| if let Kind::Epoch(n) = kind { Some(n) } else { None });
            if let Some(last) = last(self.epochs) {
                let mut numbers: Vec<u64> = epochs.iter().map(|(n, _)| *n).collect();
                numbers.dedup();
                if let Some(most) = numbers.get(usize::try_from(last).unwrap_or(usize::MAX)) {
                    old.extend(epochs.iter().filter(|(n, _)| n <= most).map(|(_, f)| (*f).clone()));
                }
            }
        }
        old
    }
}

/// The name of a file, as sd-scripts has it; it cuts no adapters.
pub(super) fn file_name(name: &str, kind: Kind, part: Part) -> String {
    let part = match part {
        Part::Adapter => String::new(),
        Part::Ranks(rank) => format!("-r{rank}"),
        Part::State => "-state".into(),
    };
    match kind {
        Kind::Step(n) => format!("{name}-step{n:08}{part}.safetensors"),
        Kind::Epoch(n) => format!("{name}-{n:06}{part}.safetensors"),
        Kind::Best => format!("{name}-best{part}.safetensors"),
        Kind::Final => format!("{name}{part}.safetensors"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Config;
    use super::*;

    fn saving(options: &str) -> Saving {
        let text = format!("output_dir = 'out'\noutput_name = 'x'\n{options}");
        Config::parse(&text).unwrap().saving
    }

    /// Plays a run of `steps` steps in epochs of `length`, and gives what is on the disk after each step.
    fn play(options: &str, steps: u64, length: u64) -> Vec<Vec<String>> {
        let (saving, mut run, mut disk) = (saving(options), Run::default(), Vec::<String>::new());
        let mut seen = Vec::new();
        for step in 1..=steps {
            let mut moments = vec![Moment::Step];
            if step % length == 0 {
                moments.push(Moment::Epoch);
            }
            for moment in moments {
                run.epoch += u64::from(moment == Moment::Epoch);
                for kind in saving.due(moment, step, true, f64::NAN, &run) {
                    for part in saving.parts() {
                        let file = file_name("x", kind, part);
                        disk.push(file.clone());
                        run.note(Kept { file, kind, state: part == Part::State });
                    }
                }
                for old in saving.outdated(&run.files) {
                    disk.retain(|file| *file != old.file);
                    run.files.retain(|kept| *kept != old);
                }
            }
            seen.push(disk.clone());
        }
        seen
    }

    /// What sd-scripts' rules leave: with every save, a single older file goes.
    fn sd_scripts(options: [Option<u64>; 4], steps: u64, length: u64) -> Vec<Vec<String>> {
        let [every_steps, last_steps, every_epochs, last_epochs] = options;
        let mut disk = Vec::<String>::new();
        let mut seen = Vec::new();
        for step in 1..=steps {
            if let Some(every) = every_steps.filter(|every| step % every == 0) {
                disk.push(format!("x-step{step:08}.safetensors"));
                if let Some(old) = last_steps.and_then(|last| (step - 1).checked_sub(last)) {
                    let old = format!("x-step{:08}.safetensors", old - old % every);
                    disk.retain(|file| *file != old);
                }
            }
            let epoch = step / length;
            if let Some(every) = every_epochs.filter(|every| step % length == 0 && epoch % every == 0) {
                disk.push(format!("x-{epoch:06}.safetensors"));
                if let Some(old) = last_epochs.and_then(|last| epoch.checked_sub(last * every)) {
                    let old = format!("x-{old:06}.safetensors");
                    disk.retain(|file| *file != old);
                }
            }
            seen.push(disk.clone());
        }
        seen
    }

    #[test]
    fn the_files_of_every_step_are_those_of_sd_scripts() {
        for (every_steps, last_steps, every_epochs, last_epochs) in [
            (Some(10), None, None, None),
            (Some(10), Some(25), None, None),
            (Some(10), Some(30), Some(1), Some(3)),
            (Some(7), Some(1), Some(2), Some(1)),
            (None, None, Some(2), Some(2)),
            (Some(3), Some(100), Some(3), None),
        ] {
            let options = [
                ("save_every_n_steps", every_steps),
                ("save_last_n_steps", last_steps),
                ("save_every_n_epochs", every_epochs),
                ("save_last_n_epochs", last_epochs),
            ];
            let given = options.iter().filter_map(|(name, value)| Some(format!("{name} = {}\n", (*value)?)));
            let got = play(&given.collect::<String>(), 120, 12);
            let want = sd_scripts([every_steps, last_steps, every_epochs, last_epochs], 120, 12);
            assert_eq!(got, want, "{options:?}");
        }
    }

    #[test]
    fn states_follow_the_adapters_or_their_own_numbers() {
        let last = |options: &str| play(options, 40, 100).pop().unwrap();
        let both = last("save_state = true\nsave_every_n_steps = 10\nsave_last_n_steps = 10");
        let want = ["step00000030", "step00000030-state", "step00000040", "step00000040-state"];
        assert_eq!(both, want.map(|end| format!("x-{end}.safetensors")));
        let own = last("save_state = true\nsave_every_n_steps = 20\nsave_last_n_steps_state = 1");
        let want = ["step00000020", "step00000040", "step00000040-state"];
        assert_eq!(own, want.map(|end| format!("x-{end}.safetensors")));
    }

    #[test]
    fn cut_adapters_go_with_the_whole_ones() {
        let last = |options: &str| {
            let options = format!("algo = 'dylora'\nsave_ranks = [4, 12]\nsave_state = true\n{options}");
            play(&options, 40, 10).pop().unwrap()
        };
        let parts = |name: &str| ["", "-r4", "-r12", "-state"].map(|end| format!("{name}{end}.safetensors"));
        let steps = last("save_every_n_steps = 10\nsave_last_n_steps = 10");
        assert_eq!(steps, [parts("x-step00000030"), parts("x-step00000040")].concat());
        let epochs = last("save_every_n_epochs = 1\nsave_last_n_epochs = 2");
        assert_eq!(epochs, [parts("x-000003"), parts("x-000004")].concat());
    }

    #[test]
    fn the_best_is_what_is_less_than_all_before() {
        let (saving, mut run) = (saving("save_best = true\nsave_every_n_steps = 2"), Run::default());
        let mut due = |moment, steps, between, value: f64| {
            let kinds = saving.due(moment, steps, between, value, &run);
            if kinds.contains(&Kind::Best) {
                run.best = Some(value);
            }
            kinds
        };
        assert_eq!(due(Moment::Step, 1, true, f64::NAN), []);
        assert_eq!(due(Moment::Step, 1, true, f64::NEG_INFINITY), []);
        assert_eq!(due(Moment::Step, 2, true, 3.0), [Kind::Best, Kind::Step(2)]);
        assert_eq!(
            due(Moment::Step, 2, false, 2.0),
            [Kind::Best],
            "no step's file in the middle of an accumulation"
        );
        assert_eq!(due(Moment::Epoch, 3, true, 2.0), []);
        assert_eq!(due(Moment::End, 3, true, -1.0), [Kind::Best, Kind::Final]);
        assert_eq!(due(Moment::Step, 0, true, f64::NAN), [], "nothing was done yet");
    }

    #[test]
    fn options_that_need_others_say_so() {
        for (text, part) in [
            ("save_best = true", "`save_best` needs output_dir"),
            ("save_every_n_steps = 5", "`save_every_n_steps` needs output_dir"),
            ("output_dir = 'out'", "`output_dir` needs output_name"),
            (
                "output_dir = 'out'\noutput_name = 'a/b'",
                "`output_name` is \"a/b\", expected the beginning of a file's",
            ),
            ("output_dir = 'out'\noutput_name = 3", "`output_name` is 3, expected text"),
            ("output_dir = 'o'\noutput_name = 'x'\nsave_last_n_steps = 5", "needs save_every_n_steps"),
            (
                "output_dir = 'o'\noutput_name = 'x'\nsave_every_n_epochs = 1\nsave_last_n_epochs_state = 1",
                "`save_last_n_epochs_state` needs save_state",
            ),
            ("algo = 'dylora'\nsave_ranks = [4]", "`save_ranks` needs output_dir"),
            ("save_precision = 'fp8'", "expected float, fp32, fp16, bf16"),
            ("save_best = 1", "`save_best` is 1, expected true or false"),
            ("metadata = {a = 1}", "`metadata` is {\"a\":1}, expected an object of texts"),
        ] {
            let told = Config::parse(text).unwrap_err().to_string();
            assert!(told.contains(part), "`{part}` is missing in: {told}");
            assert!(!told.contains("2 problems"), "{told}");
        }
    }

    #[test]
    fn ranks_are_those_that_were_trained() {
        let parse = |options: &str| {
            let text = format!("output_dir = 'o'\noutput_name = 'x'\nblock_size = 4\n{options}");
            Config::parse(&text).map_err(|error| error.to_string())
        };
        let dylora = |options: &str| parse(&format!("algo = 'dylora'\n{options}"));
        for fine in [
            "save_ranks = [12, 4]",
            "save_ranks = [16, 24]\nconv_dim = 32",
            // What has no more ranks stays whole.
            "save_ranks = [12]\nname_algo_map = {'*ff*' = {network_dim = 9, conv_dim = 9, block_size = 9}}",
            "save_ranks = [4]\nname_algo_map = {'*ff*' = {algo = 'none'}}",
        ] {
            assert!(dylora(fine).is_ok(), "{fine}");
        }
        let expected = "expected a list of different ranks from 1 to below that of modules, 16";
        for wrong in ["[0]", "[16]", "[4, 8, 4]", "4", "[4.0]", "[-4]", "['4']"] {
            let told = dylora(&format!("save_ranks = {wrong}")).unwrap_err();
            assert!(told.contains("`save_ranks` is") && told.contains(expected), "{told}");
        }
        for (told, part) in [
            (dylora("save_ranks = [4, 6]"), "`save_ranks` has 6, no multiple of `block_size`, 4"),
            (
                dylora("save_ranks = [4]\nname_algo_map = {'*ff*' = {block_size = 8}}"),
                "`save_ranks` has 4, no multiple of `name_algo_map.*ff*.block_size`, 8",
            ),
            (
                dylora("save_ranks = [4]\nname_algo_map = {'*ff*' = {algo = 'lora'}}"),
                "`name_algo_map.*ff*.algo` is lora",
            ),
            (parse("save_ranks = [4]\nname_algo_map = {'*ff*' = {network_dim = 8}}"), "; `algo` is lora"),
            (parse("save_ranks = [4]\nalgo = 'tlora'"), "`save_ranks` needs algo dylora"),
            (
                dylora("save_ranks = [4]\nnetwork_weights = 'a'\ndim_from_weights = true"),
                "not those of dim_from_weights",
            ),
        ] {
            let told = told.unwrap_err();
            assert!(told.contains(part) && !told.contains("2 problems"), "`{part}` is missing in: {told}");
        }
    }
}
