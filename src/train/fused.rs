//! An update on a GPU (`kernels/optimizer.cu`), for most optimizers in one pass: clip, optimizer, average of the parameters, working copy,
//! clearing the gradient.
//!
//! Nothing waits for the device. Whether a gradient is finite is decided there, and what changes from step to step (the count, the learning
//! rate, corrections) lies there, in the clock; so the launches can be captured into a CUDA graph, and a replay is a step like any other.
//! The schedule is a function of the step on the host: the clock holds the rates of the coming [`RATES`] steps, and is refilled, with a wait,
//! where those could have been used up.

use super::config::Config;
use super::network::train;
use super::optim::{Now, Optimizer, Rule, Way};
use super::params::{kind, Params};
use super::schedule::Schedule;
use super::update::Step;
use crate::cuda::{self, Arg, Gpu, Launcher};
use crate::dtype::Float;
use crate::error::{Error, Result};
use crate::torch_ext::on_current_stream;
use tch::{Device, Kind, Tensor};

/// Elements whose squares one block sums.
const PART: usize = 16384;
/// Learning rates that are on the device at once.
const RATES: usize = 4096;
/// Elements of a block of the update.
const BLOCK: usize = 1024;
/// Numbers of the kernels' Moment.
const MOMENT: usize = 5;
/// Warps of a block of the update in 8 bits.
const WARPS: usize = 8;
/// Elements that share a scale in 8 bits.
const SCALED: usize = super::optim::adamw8bit::SCALED;

/// The fields of the kernels' Clock, all f64, by their index.
const STEPS: usize = 0;
const SKIPPED: usize = 1;
const STARVED: usize = 2;
const HELD: usize = 3;
const NORM: usize = 4;
const RATE: usize = 5;
const UPDATED: usize = 6;
const SCALE: usize = 7;
const FIRST: usize = 8;
const FIELDS: usize = 9;

/// The kernels' Job.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct Job {
    master: u64,
    gradient: u64,
    ema: u64,
    working: u64,
    state: [u64; 10],
    carried: [u64; 4],
    clock: u64,
    partial: u64,
    moment: u64,
    ranges: u64,
    factors: u64,
    scalars: u64,
    numbers: [f64; 12],
    average: f64,
    max_norm: f64,
    ema_share: f64,
    count: u64,
    parts: u32,
    range_count: u32,
    blocks: u32,
    working_dtype: u32,
    forgiving: u32,
}

/// A network's updates on a GPU.
pub(super) struct Fused {
    gpu: &'static Gpu,
    /// The rule's name in that of its kernels.
    kernel: &'static str,
    way: Way,
    job: Job,
    /// Blocks of the update.
    grid: u32,
    clock: Tensor,
    /// What the job points to, beside the parameters.
    _tables: Vec<Tensor>,
    /// How many updates the rates on the device are sure to suffice for.
    left: u64,
    /// Whether the device may have done steps that the host has not asked about.
    behind: bool,
    /// Whether there may be a graph, which the host can replay at any time.
    captured: bool,
    /// The counts of left out steps that have been told.
    told: [f64; 2],
}

impl Fused {
    /// `None` where the kernels do not serve: on a CPU, in a library without kernels, on a device that they were not compiled for, for an
    /// optimizer without a rule.
    pub fn new(
        config: &Config,
        params: &Params,
        optimizer: &dyn Optimizer,
        ema: Option<&Tensor>,
    ) -> Result<Option<Self>> {
        let (Device::Cuda(index), Some(mut rule)) = (params.master().device(), optimizer.rule()) else {
            return Ok(None);
        };
        let Ok(gpu) = cuda::gpu(index) else { return Ok(None) };
        let (master, device) = (params.master(), params.master().device());
        let count = master.numel();
        let (ranges, blocks) = ranges(&mut rule);
        let here = |table: Tensor| table.f_to_device(device);
        let factors: Vec<f64> = rule.ranges.iter().map(|range| range.factor).collect();
        let (ranges, factors) =
            (here(Tensor::f_from_slice(&ranges)?)?, here(Tensor::f_from_slice(&factors)?)?);
        let zeros = |length: usize, kind| Tensor::f_zeros([length as i64], (kind, device));
        let scalars = zeros(factors.numel() * 16, Kind::Float)?;
        let parts = count.div_ceil(PART);
        let measured = rule.way == Way::Measured;
        let partial = zeros(if measured { 3 * parts } else { parts }, Kind::Double)?;
        let moment = zeros(MOMENT, Kind::Double)?;
        let clock = zeros(FIELDS + RATES, Kind::Double)?;
        let at = |tensor: &Tensor| tensor.data_ptr() as u64;
        let mut job = Job {
            master: at(master),
            gradient: at(params.gradient()),
            ema: ema.map_or(0, at),
            working: params.working().map_or(0, at),
            clock: at(&clock),
            partial: at(&partial),
            ranges: at(&ranges),
            factors: at(&factors),
            scalars: at(&scalars),
            average: 1.0 / config.gradient_accumulation_steps as f64,
            max_norm: config.max_grad_norm,
            ema_share: 1.0 - config.ema_decay.unwrap_or(0.0),
            count: count as u64,
            moment: if measured { at(&moment) } else { 0 },
            parts: parts as u32,
            range_count: factors.numel() as u32,
            blocks: blocks as u32,
            working_dtype: u32::from(params.compute() == kind(Float::BF16)) + 1,
            ..Job::default()
        };
        job.state.iter_mut().zip(&rule.state).for_each(|(to, tensor)| *to = at(tensor));
        job.carried.iter_mut().zip(&rule.carried).for_each(|(to, tensor)| *to = at(tensor));
        job.numbers.iter_mut().zip(&rule.numbers).for_each(|(to, number)| *to = *number);
        // Tables are loaded by each block: no more of them than run at once.
        let grid = match blocks {
            0 => count.div_ceil(BLOCK),
            _ => blocks.div_ceil(WARPS).min(gpu.multiprocessors() * 4),
        };
        let mut fused = Fused {
            gpu,
            kernel: rule.kernel,
            way: rule.way,
            job,
            grid: grid as u32,
            clock,
            _tables: vec![ranges, factors, scalars, partial, moment],
            left: 0,
            behind: false,
            captured: false,
            told: [0.0; 2],
        };
        fused.start(0, config.schedule())?;
        Ok(Some(fused))
    }

    /// Sets the count of updates.
    pub fn start(&mut self, steps: u64, schedule: &Schedule) -> Result<()> {
        self.set(STEPS, &[steps as f64])?;
        self.fill(steps, schedule)
    }

    /// Enqueues one update on the current stream; `pass` is the optimizer's own part of it, if it has one. A gradient that is not finite
    /// changes nothing; it is cleared and counted if `forgiving`, else kept.
    pub fn step(
        &mut self,
        forgiving: bool,
        schedule: &Schedule,
        pass: impl FnOnce(&Now) -> Result<()>,
    ) -> Result<()> {
        let captured = on_current_stream(self.gpu, Launcher::is_capturing)?;
        if captured && !forgiving {
            return Err(Error::argument(
                "a step that tells what it did waits for the device, which a CUDA graph that is being captured cannot",
                "let it tell nothing (`out` NULL, in Python wait=False); ask for the results later",
            ));
        }
        if captured {
            self.captured = true;
        } else {
            self.expect(1, schedule)?;
        }
        let job = Job { forgiving: u32::from(forgiving), ..self.job };
        let launch = |kernels: &[(&str, u32, u32)]| {
            on_current_stream(self.gpu, |launcher| {
                let arguments = [Arg::plain(&job)];
                kernels.iter().try_for_each(|&(kernel, blocks, threads)| {
                    let kernel =
                        if kernel == "squares" { kernel.into() } else { format!("{kernel}_{}", self.kernel) };
                    // SAFETY: the job is the kernels' only parameter; it points to tensors that live as long as the network and have the
                    // sizes that it tells. The host orders what it does with them by its streams.
                    unsafe { launcher.launch("optimizer", &kernel, blocks, threads, &arguments) }
                })
            })
        };
        launch(&[("squares", job.parts, 256), ("decide", 1, 1024)])?;
        match self.way {
            Way::Once => {}
            Way::Measured => launch(&[("gather", job.parts, 256), ("measure", 1, 1024)])?,
            Way::Passes => {
                let field = |at: usize| Ok::<_, Error>(self.clock.f_get(at as i64)?);
                let (rate, step, moves) = (field(RATE)?, field(STEPS)?, field(UPDATED)?);
                tch::no_grad(|| pass(&Now { rate, step, moves, scale: Some(field(SCALE)?) }))?;
            }
        }
        launch(&[("update", self.grid, 256)])
    }

    /// So many updates are about to be enqueued on the current stream: their learning rates are made ready. Waits for the stream once in some
    /// thousand updates.
    pub fn expect(&mut self, updates: u64, schedule: &Schedule) -> Result<()> {
        if updates > RATES as u64 {
            return Err(Error::argument(
                format!("a graph of {updates} updates; {RATES} is the most"),
                "capture fewer steps",
            ));
        }
        if self.left < updates {
            self.fill(self.read()?[STEPS] as u64, schedule)?;
        }
        self.left -= updates;
        self.behind |= updates > 0;
        Ok(())
    }

    /// What the last step did, once it has done so, and how many were left out since this was last told. Waits for the current stream.
    pub fn results(&mut self, schedule: &Schedule) -> Result<Step> {
        let clock = self.read()?;
        self.behind = false;
        let steps = clock[STEPS] as u64;
        let used = steps - clock[FIRST] as u64;
        self.left = (RATES as u64).saturating_sub(used);
        if self.left < RATES as u64 / 2 {
            self.fill(steps, schedule)?;
        }
        let [skipped, starved] = self.told;
        self.told = [clock[SKIPPED], clock[STARVED]];
        if clock[STARVED] > starved {
            return Err(train(
                format!(
                    "{} updates were left out: their learning rates were not on the device",
                    clock[STARVED] - starved
                ),
                "call lycore_network_prepare_replay before each launch of a captured graph",
            ));
        }
        Ok(Step {
            step: steps,
            learning_rate: clock[RATE],
            grad_norm: clock[NORM],
            updated: clock[UPDATED] != 0.0,
            skipped: (clock[SKIPPED] - skipped) as u64,
        })
    }

    /// 1 if the last step changed anything, else 0; on the device, f32.
    pub fn updated(&self) -> Result<Tensor> {
        Ok(self.clock.f_get(UPDATED as i64)?.f_to_kind(Kind::Float)?)
    }

    /// While held, steps change nothing but the gradient, which they clear.
    pub fn hold(&mut self, held: bool) -> Result<()> {
        self.set(HELD, &[f64::from(held)])
    }

    /// Waits for whatever steps there may be on any stream; the number of updates, if it can be another than the host last heard.
    pub fn settled_steps(&self) -> Result<Option<u64>> {
        if !self.behind && !self.captured {
            return Ok(None);
        }
        self.gpu.synchronize()?;
        Ok(Some(self.read()?[STEPS] as u64))
    }

    /// The learning rates from step `steps` on.
    fn fill(&mut self, steps: u64, schedule: &Schedule) -> Result<()> {
        let rates = (steps..steps + RATES as u64).map(|done| schedule.learning_rate(done));
        let fields: Vec<f64> = std::iter::once(steps as f64).chain(rates).collect();
        self.left = RATES as u64;
        self.set(FIRST, &fields)
    }

    fn set(&mut self, field: usize, values: &[f64]) -> Result<()> {
        tch::no_grad(|| {
            let mut fields = self.clock.f_narrow(0, field as i64, values.len() as i64)?;
            fields.f_copy_(&Tensor::f_from_slice(values)?)
        })?;
        Ok(())
    }

    /// The clock, in the order of the current stream.
    fn read(&self) -> Result<[f64; FIELDS]> {
        let mut fields = [0.0; FIELDS];
        self.clock.f_narrow(0, 0, FIELDS as i64)?.f_copy_data(&mut fields, FIELDS)?;
        Ok(fields)
    }
}

/// The kernels' table of ranges, and the number of blocks that share a scale. Neighbours of one rate become one.
fn ranges(rule: &mut Rule) -> (Vec<i64>, usize) {
    let Some(blocks) = &rule.blocks else {
        rule.ranges.dedup_by(|next, last| {
            let joins = (last.end, last.factor) == (next.start, next.factor);
            if joins {
                last.end = next.end;
            }
            joins
        });
        return (rule.ranges.iter().flat_map(|r| [r.start as i64, r.end as i64, 0, 0]).collect(), 0);
    };
    let mut before = 0;
    let mut table = Vec::with_capacity(blocks.len() * 4);
    for (range, &(kept, small)) in rule.ranges.iter().zip(blocks) {
        let last = i64::from(small) | (before as i64) << 32;
        table.extend([range.start as i64, range.end as i64, kept as i64, last]);
        before += (range.end - range.start).div_ceil(SCALED);
    }
    (table, before)
}

#[cfg(test)]
mod tests {
    use super::super::network::Built;
    use super::super::optim::{Layout, Options};
    use super::super::params::Plan;
    use super::*;
    use crate::algo::training::{Init, Parameter};

    const CONFIG: &str = r#"{"mixed_precision": "bf16", "learning_rate": 0.01, "lr_scheduler": "cosine", "max_train_steps": 250,
        "lr_warmup_steps": 20, "max_grad_norm": 20, "gradient_accumulation_steps": 2, "ema_decay": 0.9}"#;

    /// A configuration with no default among the optimizer's numbers; `None` for an optimizer without a rule.
    fn config(name: &str) -> Option<Config> {
        let arguments = match name {
            "AdamW" => r#"{"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1}"#,
            "AdamW8bit" => {
                r#"{"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "min_8bit_size": 2000}"#
            }
            "SGDNesterov" => r#"{"momentum": 0.8, "weight_decay": 0.1}"#,
            "Prodigy" => {
                r#"{"betas": [0.8, 0.95], "beta3": 0.9, "eps": 1e-6, "weight_decay": 0.1, "d0": 1e-3, "d_coef": 2,
                    "use_bias_correction": true, "safeguard_warmup": true, "growth_rate": 1.5, "slice_p": 3}"#
            }
            "DAdaptAdam" => {
                r#"{"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "d0": 1e-3, "use_bias_correction": true,
                    "growth_rate": 1.5}"#
            }
            "Adafactor" => {
                r#"{"eps": [1e-20, 1e-2], "clip_threshold": 0.7, "decay_rate": -0.7, "beta1": 0.8, "weight_decay": 0.1,
                    "relative_step": false}"#
            }
            "CAME" => {
                r#"{"betas": [0.8, 0.95, 0.98], "eps": [1e-20, 1e-12], "clip_threshold": 0.7, "weight_decay": 0.1}"#
            }
            "DAdaptLion" => r#"{"betas": [0.8, 0.95], "weight_decay": 0.1, "d0": 1e-4}"#,
            "Lion" => r#"{"betas": [0.8, 0.95], "weight_decay": 0.1}"#,
            "AdamWScheduleFree" => {
                r#"{"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "warmup_steps": 30, "r": 0.5, "weight_lr_power": 1.5}"#
            }
            "RAdamScheduleFree" => {
                r#"{"betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1, "r": 0.5, "silent_sgd_phase": false}"#
            }
            _ => return None,
        };
        let mut text = format!(
            r#"{}, "optimizer_type": "{name}", "optimizer_args": {arguments}}}"#,
            &CONFIG[..CONFIG.len() - 1]
        );
        if name == "AdamW8bit" {
            // The norms of the two paths differ in their last bit; a clipped gradient would then turn a code here and there.
            text = text.replace(r#""max_grad_norm": 20"#, r#""max_grad_norm": 0"#);
        }
        if name.contains("ScheduleFree") {
            text = text.replace("cosine", "constant_with_warmup").replace(r#", "ema_decay": 0.9"#, "");
        }
        Some(Config::parse(&text).unwrap())
    }

    /// Parameters of several sizes with four rates, on the first GPU; without one, why not.
    fn built(config: &Config) -> Option<Built> {
        if let Err(e) = cuda::gpu(0).and(crate::torch_ext::require_cuda()) {
            eprintln!("skipped: {e}");
            return None;
        }
        let device = Device::Cuda(0);
        let mut plan = Plan::new(config.optimizer.alignment());
        let shapes = [&[37, 50][..], &[64], &[3, 4096], &[15], &[7], &[130, 20], &[1], &[3, 4096], &[37, 50]];
        for (shape, rate) in shapes.into_iter().zip([1.0, 3.0, 1.0, 0.5, 3.0, 1.0, 0.0, 1.0, 1.0]) {
            plan.push(&Parameter::new("slot", shape, Init::ZEROS), rate).unwrap();
        }
        let groups = plan.place();
        let params = Params::new(plan, device, config.mixed_precision, |i, values| {
            values.iter_mut().enumerate().for_each(|(at, v)| *v = ((at + i) as f32 * 0.7).cos());
        })
        .unwrap();
        let layout = Layout::new(params.segments(), groups, config.schedule().base);
        let optimizer = tch::no_grad(|| config.optimizer.build(&layout, params.master()).unwrap());
        let ema = config.ema_decay.map(|_| params.master().copy());
        let fused = Fused::new(config, &params, &*optimizer, ema.as_ref()).unwrap();
        Some(Built { params, optimizer, ema, fused, device, draws: None, ranks: None })
    }

    /// Gradient `t`: large ones that are clipped and small ones, with zeros where there is no parameter.
    fn gradient(built: &Built, t: u64) -> Tensor {
        let mut values = vec![0f32; built.params.gradient().numel()];
        for segment in built.params.segments() {
            for (i, value) in values[segment.offset..][..segment.count()].iter_mut().enumerate() {
                let x = (i as f64 * 0.61 + t as f64 * 1.7).sin() + 0.3;
                *value = (x * 10f64.powi(i as i32 % 5 - 4) * if t % 3 == 0 { 9.0 } else { 1.0 }) as f32;
            }
        }
        Tensor::from_slice(&values).to_device(built.device)
    }

    fn give(built: &mut Built, gradient: &Tensor) {
        tch::no_grad(|| built.params.update().1.copy_(gradient));
    }

    fn enqueue(built: &mut Built, config: &Config, forgiving: bool) {
        built.step(forgiving, config.schedule()).unwrap();
    }

    fn step(built: &mut Built, config: &Config, gradient: &Tensor) -> Step {
        give(built, gradient);
        enqueue(built, config, true);
        built.fused.as_mut().unwrap().results(config.schedule()).unwrap()
    }

    /// All that a step changes.
    fn everything(built: &Built) -> Vec<Tensor> {
        let mut all = vec![built.params.master().copy(), built.params.gradient().copy()];
        all.extend(built.params.working().map(Tensor::copy));
        all.extend(built.ema.as_ref().map(Tensor::copy));
        all.extend(built.optimizer.state().into_iter().map(|(_, tensor)| tensor.copy()));
        all
    }

    #[test]
    fn two_hundred_updates_are_those_of_every_optimizer() {
        for name in Options::NAMES {
            let Some(config) = config(name) else { continue };
            let (Some(mut fused), Some(mut plain)) = (built(&config), built(&config)) else { return };
            plain.fused = None;
            let start = plain.params.master().copy();
            for t in 0..200 {
                let gradient = gradient(&fused, t);
                give(&mut plain, &gradient);
                let want = plain.update(&config, t).unwrap();
                if let Some(ema) = &mut plain.ema {
                    let _ = tch::no_grad(|| ema.lerp_(plain.params.master(), 0.1));
                }
                let got = step(&mut fused, &config, &gradient);
                assert_eq!((got.step, got.updated, got.learning_rate), (t + 1, true, want.learning_rate));
                assert!((got.grad_norm / want.grad_norm - 1.0).abs() < 1e-6, "{name}, {t}");
                if t > 0 && t < 199 {
                    continue;
                }
                let pairs = [
                    (Some(fused.params.master()), Some(plain.params.master())),
                    (fused.ema.as_ref(), plain.ema.as_ref()),
                ];
                for (got, want) in pairs.into_iter().filter_map(|(got, want)| got.zip(want)) {
                    let off = ((got - want).abs() / want.abs().max()).sort(0, true).0;
                    // As beside the originals: a rounding can turn a sign, or a state that is one of 256.
                    let outliers = if matches!(*name, "Lion" | "AdamW8bit" | "DAdaptLion") { 8 } else { 0 };
                    let off = off.double_value(&[outliers]);
                    // 2^-24 for each of 200 updates, which mostly cancel.
                    assert!(off < 5e-6, "{name}, step {}: off by {off}", t + 1);
                }
            }
            let moved = (plain.params.master() - start).norm().double_value(&[]);
            assert!(moved > 1.0, "{name}: nothing was learned");
            let (master, working) = (fused.params.master(), fused.params.working().unwrap());
            assert!(master.to_kind(Kind::BFloat16).equal(working), "{name}: rounded to nearest even");
            assert_eq!(fused.params.gradient().abs().max().double_value(&[]), 0.0, "{name}");
        }
    }

    #[test]
    fn the_same_gradients_give_the_same_bits() {
        for name in Options::NAMES {
            let Some(config) = config(name) else { continue };
            let (Some(mut a), Some(mut b)) = (built(&config), built(&config)) else { return };
            for t in 0..20 {
                let gradient = gradient(&a, t);
                assert_eq!(step(&mut a, &config, &gradient), step(&mut b, &config, &gradient));
            }
            assert!(everything(&a).iter().zip(everything(&b)).all(|(a, b)| a.equal(&b)), "{name}");
        }
    }

    #[test]
    fn what_is_not_finite_and_what_is_held_changes_nothing() {
        for name in Options::NAMES {
            let Some(config) = config(name) else { continue };
            let Some(mut built) = built(&config) else { return };
            let good = gradient(&built, 0);
            let fresh = everything(&built);
            assert!(!step(&mut built, &config, &(&good * f64::NAN)).updated);
            assert!(everything(&built).iter().zip(&fresh).all(|(now, fresh)| now.equal(fresh)), "{name}");
            step(&mut built, &config, &good);
            let before = everything(&built);
            assert!(before.iter().all(|t| t.isfinite().all().double_value(&[]) == 1.0), "{name}");
            let unchanged =
                |built: &Built| everything(built).iter().zip(&before).all(|(now, before)| now.equal(before));
            for bad in [f64::NAN, f64::INFINITY] {
                let gradient = good.copy();
                let _ = gradient.narrow(0, 70, 1).fill_(bad);
                let told = step(&mut built, &config, &gradient);
                assert_eq!((told.step, told.updated, told.skipped), (1, false, 1), "{name}");
                assert!(unchanged(&built), "{name}: and the gradient is cleared");
                // Who waits gets the gradient back.
                give(&mut built, &gradient);
                enqueue(&mut built, &config, false);
                let fused = built.fused.as_mut().unwrap();
                assert_eq!(fused.results(config.schedule()).unwrap().skipped, 0);
                assert!(built.params.gradient().narrow(0, 0, 64).equal(&gradient.narrow(0, 0, 64)), "{name}");
            }
            let fused = built.fused.as_mut().unwrap();
            fused.hold(true).unwrap();
            assert!(!step(&mut built, &config, &good).updated);
            assert!(unchanged(&built), "{name}");
            built.fused.as_mut().unwrap().hold(false).unwrap();
            assert!(step(&mut built, &config, &good).updated);
            assert!(!unchanged(&built), "{name}");
        }
    }

    #[test]
    fn learning_rates_do_not_run_out() {
        let config = Config::parse(r#"{"lr_scheduler": "inverse_sqrt", "lr_warmup_steps": 10}"#).unwrap();
        let Some(mut built) = built(&config) else { return };
        let schedule = config.schedule();
        let fused = built.fused.as_mut().unwrap();
        for t in 1..=2 * RATES as u64 + 100 {
            fused.step(true, schedule, |_| Ok(())).unwrap();
            if t % 5000 == 1 || t > 2 * RATES as u64 + 98 {
                let told = fused.results(schedule).unwrap();
                assert_eq!((told.step, told.learning_rate), (t, schedule.learning_rate(t - 1)));
            }
        }
        assert_eq!(fused.settled_steps().unwrap(), None, "all was told");
        // A graph that is replayed without asking.
        fused.start(7, schedule).unwrap();
        fused.left = u64::MAX;
        (0..RATES + 3).for_each(|_| fused.step(true, schedule, |_| Ok(())).unwrap());
        assert_eq!(fused.settled_steps().unwrap(), Some(7 + RATES as u64));
        let error = fused.results(schedule).unwrap_err().to_string();
        assert!(error.contains("3 updates were left out"), "{error}");
        fused.step(true, schedule, |_| Ok(())).unwrap();
        assert_eq!(fused.results(schedule).unwrap().step, 8 + RATES as u64);
        assert!(fused.expect(RATES as u64 + 1, schedule).is_err());
    }
}
