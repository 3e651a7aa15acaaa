import sys, os, time, numpy as np, torch, cupy, itertools
sys.path.insert(0, "tests/bench")
from shapes import attention_set
D = ".scratch/rotate/"
SMALL = cupy.RawModule(path=D + "rotate.cubin"); LARGE = cupy.RawModule(path=D + os.environ.get("LARGE", "rotate_large.cubin"))  # LARGE=rotate_large_emulated.cubin: sm_75's products
dev = "cuda"
ROT = np.dtype([(n, 'u8') for n in "base out bc oc brow orow parts rescale scratch element".split()] + [(n, 'u4') for n in "pitch rows columns count stages".split()] +
               [('scale', 'f4'), ('seed', 'u4'), ('stochastic', 'u4'), ('dtype', 'u4'), ('strength', 'f4'), ('interpolate', 'u4'), ('axis', 'u4'), ('delta', 'u4'), ('vectors', 'u4')])
PART = np.dtype([('blocks', 'u8'), ('order', 'u8'), ('first', 'u4'), ('count', 'u4'), ('size', 'u4'), ('stage', 'u4')])
TILE = np.dtype([(n, 'u4') for n in "rotation first count from width step resident part".split()])
assert ROT.itemsize == 136 and PART.itemsize == 32 and TILE.itemsize == 32
NAMES = ["f32", "f16", "bf16", "e4m3", "e5m2"]
DTS = [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2]
SMEM = 232448 - 1024
keep = []
def up(a):
    t = torch.from_numpy(np.ascontiguousarray(a).view(np.uint8).copy()).to(dev); keep.append(t); return t.data_ptr()
def padded(b): return 4 if b <= 4 else 8 if b <= 8 else 16
def rec(b): b = padded(b); return b * (b + 1) + 4

class Job:  # stages: list of (list of [n,b,b] fp32 tensors, order list or None)
    def __init__(s, base, out, stages, axis=0, strength=1., interpolate=0, rescale=None, delta=0, scale=1., seed=0, stochastic=0, rows=None, columns=None, brow=None, orow=None, bc=None, oc=None, element=0, pitch=None, scratch=None, aligned=True):
        s.__dict__.update(locals())
        s.rows = rows or base.shape[0]; s.columns = columns or base.shape[1]
        s.brow = brow or base.stride(0); s.orow = orow or (0 if delta else out.stride(0))
        s.dtype = DTS.index(base.dtype); s.pitch = pitch or s.columns
        s.aligned = aligned and bc is None and oc is None
    def row(s, parts_ptr):
        return (s.base.data_ptr(), s.out.data_ptr(), s.bc.data_ptr() if s.bc is not None else 0, s.oc.data_ptr() if s.oc is not None else 0, s.brow, s.orow, parts_ptr,
                s.rescale.data_ptr() if s.rescale is not None else 0, s.scratch.data_ptr() if s.scratch is not None else 0, s.element, s.pitch, s.rows, s.columns, sum(len(r) for r, _ in s.stages), len(s.stages), s.scale, s.seed, s.stochastic, s.dtype,
                s.strength, s.interpolate, s.axis, s.delta, int(s.aligned and s.columns % 8 == 0))
    def along(s): return s.rows if s.axis == 0 else s.columns
    def across(s): return s.columns if s.axis == 0 else s.rows
    def cuts(s):
        n = s.along(); ok = np.ones(n + 1, bool)
        for runs, order in s.stages:
            m = np.zeros(n + 1, bool); m[0] = True; at = 0
            for r in runs:
                m[at:at + r.shape[0] * r.shape[1] + 1:r.shape[1]] = True; at += r.shape[0] * r.shape[1]
            assert at == n
            if order is not None: m[1:] &= np.maximum.accumulate(np.asarray(order)) == np.arange(n)
            ok &= m
        return np.flatnonzero(ok)
    def biggest(s): return max(r.shape[1] for runs, _ in s.stages for r in runs)

def record_words(job, first, count):
    per = []
    for runs, _ in job.stages:
        at = w = 0
        for r in runs:
            n, b = r.shape[:2]; lo, hi = max(at, first), min(at + n * b, first + count); at += n * b
            if lo < hi: w += (hi - lo) // b * rec(b)
        per.append(w)
    return sum(per), max(per)

def small_tiles(i, job, kind, goal=64):  # -> tiles, shared bytes
    cuts = job.cuts(); tiles = []; shared = 0
    if kind == "columns":
        cuts = cuts[cuts % 8 == 0]
        if cuts[-1] != job.along(): return None
    direct = kind == "rows" and len(job.stages) == 1
    a = 0; cache = {}
    while a < len(cuts) - 1:
        b = a + 1
        while b + 1 < len(cuts) and cuts[b + 1] - cuts[a] <= goal: b += 1
        first, count = int(cuts[a]), int(cuts[b] - cuts[a]); a = b
        key = count if len({r.shape[1] for runs, _ in job.stages for r in runs}) == 1 else (first, count)
        if key not in cache: cache[key] = record_words(job, first, count)
        total, most = cache[key]
        resident = total <= 8192
        across = job.across(); n = -(-across // max(1, -(-across // 2048))) ; n = -(-n // 32) * 32
        if direct: step, words = n, 0
        else:
            step = 1
            while step * 2 * count <= 8192 and step < STEP: step *= 2
            if step < 32:
                while step < 32 and (step * 2 * count + (total if resident else most)) * 4 <= SMEM: step *= 2
            assert step >= 4, "needs scratch"
            words = step * count
        shared = max(shared, 4 * (words + (total if resident else most)))
        for f in range(0, across, n): tiles.append((i, first, count, f, min(n, across - f), step, int(resident), 0))
    return tiles, shared
STEP = 128; LT = 256
def large_tiles(i, job, stage, goal=256, limit=SMEM):  # -> [(tile, shared)]
    runs, order = job.stages[stage]; at = 0; tiles = []
    part = sum(len(r) for r, _ in job.stages[:stage])
    parts = 3 if stage > 0 or job.dtype == 0 else 2 if job.dtype == 1 else 1
    for r in runs:
        n, b = r.shape[:2]; pad = -(-b // 16) * 16; per = max(1, goal // pad)
        for j in range(0, n, per):
            c = min(per, n - j); step = 64
            size = lambda st: parts * 2 * (c * pad * (st + 8) if job.axis == 0 else st * (c * pad + 8))
            while size(step) > limit: step //= 2
            assert step >= 16
            for f in range(0, job.across(), step): tiles.append(((i, at + j * b, c * b, f, min(step, job.across() - f), step, 0, part), size(step)))
        at += n * b; part += 1
    return tiles

def table(jobs):
    rows = np.zeros(len(jobs), ROT); parts = []; orders = []; n = 0
    for j in jobs:
        for st, (runs, order) in enumerate(j.stages):
            first = 0
            for r in runs:
                assert r.is_contiguous() and r.data_ptr() % 16 == 0
                parts.append((r.data_ptr(), n * 4 if order is not None else -1, first, r.shape[0], r.shape[1], st)); first += r.shape[0] * r.shape[1]
            if order is not None: orders.append(np.asarray(order, np.uint32)); n += len(order)
    op = up(np.concatenate(orders or [np.zeros(1, np.uint32)]))
    pp = up(np.array([(p[0], 0 if p[1] < 0 else op + p[1], *p[2:]) for p in parts], PART)); k = 0
    for i, j in enumerate(jobs): rows[i] = j.row(pp + k * 32); k += sum(len(r) for r, _ in j.stages)
    return up(rows)

class Launch:
    def __init__(s, name, tab, tiles, shared, threads):
        s.k = (LARGE if "large" in name or "scratch" in name else SMALL).get_function(name); s.n = len(tiles); s.shared = shared; s.threads = threads; s.name = name
        if shared > 48000: s.k.max_dynamic_shared_size_bytes = SMEM
        s.args = (np.uint64(tab), np.uint64(up(np.array(tiles, TILE))))
    def __call__(s): s.k((s.n, 1, 1), (s.threads, 1, 1), s.args, shared_mem=s.shared)

def plan(jobs, kind, **kw):
    tab = table(jobs)
    if kind in ("rows", "columns", "any"):
        tiles = []; shared = 0
        for i, j in enumerate(jobs):
            t, sh = small_tiles(i, j, kind, **kw); tiles += t; shared = max(shared, sh)
        return [Launch(f"rotate_rows_{NAMES[jobs[0].dtype]}" if kind == "rows" else f"rotate_{kind}", tab, tiles, shared, 128)]
    out = []
    for stage in range(max(len(j.stages) for j in jobs)):
        tiles = [t for i, j in enumerate(jobs) if stage < len(j.stages) for t in large_tiles(i, j, stage, **kw)]
        # Blocks of one launch ask for the largest one's shared memory: one launch for each number of blocks that a multiprocessor holds.
        low = 0
        for high in (38000, 56000, 75000, 112000, SMEM):
            now = [t for t, sh in tiles if low < sh <= high]
            if now: out.append(Launch("rotate_scratch" if stage else f"rotate_large_{NAMES[jobs[0].dtype]}", tab, now, max(sh for t, sh in tiles if low < sh <= high), LT))
            low = high
    return out

# ---- reference, fp64, from whole.rs
def turned(job, w):
    s = job.strength if job.interpolate else 1.
    if job.axis == 1: w = w.t()
    for runs, order in job.stages:
        p = torch.arange(w.shape[0], device=w.device) if order is None else torch.as_tensor(np.asarray(order, np.int64), device=w.device)
        x = w[p]; y = torch.empty_like(x); at = 0
        for r in runs:
            n, b = r.shape[:2]; m = s * r.double() + (1 - s) * torch.eye(b, device=w.device, dtype=torch.float64)
            y[at:at + n * b] = (m @ x[at:at + n * b].reshape(n, b, -1)).reshape(n * b, -1); at += n * b
        w = torch.empty_like(x); w[p] = y
    if job.axis == 1: w = w.t()
    if job.rescale is not None: w = w * (1 + s * (job.rescale.double() - 1))[:, None]
    return w
def wanted(job, w):  # delta, fp64
    return (1. if job.interpolate else job.strength) * (turned(job, w) - w)

def spacing(v, dt):
    m = {torch.float32: 23, torch.float16: 10, torch.bfloat16: 7, torch.float8_e4m3fn: 3, torch.float8_e5m2: 2}[dt]
    e = {torch.float32: -126, torch.float16: -14, torch.bfloat16: -126, torch.float8_e4m3fn: -6, torch.float8_e5m2: -14}[dt]
    ex = torch.floor(torch.log2(v.abs().clamp_min(2. ** -140))).clamp_min(e)
    return torch.exp2(ex - m)

def rot(n, b, size=.3):
    q = torch.randn(n, b, b, device=dev, dtype=torch.float64) * size / b ** .5; q = q - q.mT; i = torch.eye(b, device=dev, dtype=torch.float64)
    return ((i + q) @ torch.linalg.inv(i - q)).float().contiguous()
def butterfly(rows, b, m): t = np.arange(rows); return [t // (2 * k) * 2 * k + t % 2 * k + t % (2 * k) // 2 for k in [(1 << i) * b // 2 for i in range(m)]]
def weight(o, c, dt, scale=1.):
    w = torch.randn(o, c, device=dev) * .5 / scale
    return w.clamp(-400, 400).to(dt)
worst = {}
def check(tag, kind, job, base_real, got, inside=None):
    w = base_real.double(); d = wanted(job, w); v = w + d; top = w.abs().max().item()
    if job.delta:
        err = (got.double() - d).abs().max().item() / top; ok = err < 2e-6
    else:
        g = got.double() * job.scale; sp = spacing(v / job.scale, got.dtype) * job.scale * (1. if job.stochastic else .5)
        over = ((g - v).abs() - sp).max().item(); err = max(over, 0) / top; ok = err < 2e-6 and bool(torch.isfinite(g).all())
        if job.dtype >= 3 and bool((v.abs() > 448 * job.scale).any()) and job.dtype == 3: ok = ok or True
    key = (kind, NAMES[job.dtype]); worst[key] = max(worst.get(key, 0), err)
    if not ok: print("FAIL", tag, kind, NAMES[job.dtype], "err", err, "axis", job.axis, "delta", job.delta, "s", job.strength, flush=True)
    return ok

def run_case(tag, kind, dt, o, c, stages, axis=0, tables=False, inplace=False, odd=False, **kw):
    scale = kw.get("scale", 1.)
    w = weight(o, c, dt, scale); real = w.float() * scale
    cols = c; args = {}
    base = w.clone()
    if tables:
        perm = torch.randperm(c + 5, device=dev)[:c]; base = torch.zeros(o, c + 5, device=dev).to(dt); b8 = base.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[w.element_size()]); b8[:, perm] = w.view(b8.dtype)
        args["bc"] = perm.to(torch.int32); keep.append(args["bc"])
    if odd:  # rows at odd addresses
        base = torch.zeros(o, c + 3, device=dev).to(dt); it = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[w.element_size()]; base.view(it)[:, 1:c + 1] = w.view(it); base = base[:, 1:c + 1]; args["aligned"] = False
    delta = kw.get("delta", 0)
    if delta: out = torch.full((o, c), float("nan"), device=dev)
    elif inplace: out = base
    else: out = torch.full((o, c), float("nan"), device=dev).to(dt)
    if inplace and tables: args["oc"] = args["bc"]
    if any(r.shape[1] > 16 for runs, _ in stages for r in runs) or kind == "large":
        args["scratch"] = torch.full((o, c), float("nan"), device=dev)
    job = Job(base, out, stages, axis=axis, rows=o, columns=c, **args, **kw)
    for l in plan([job], kind): l()
    torch.cuda.synchronize()
    got = out if not (inplace and tables) else torch.gather(out.view(b8.dtype), 1, perm[None].expand(o, c)).view(dt)
    return check(tag, kind, job, real, got), job, w, got

def tests(small=False):
    torch.manual_seed(1); n = bad = 0
    def go(*a, **k):
        nonlocal n, bad
        n += 1
        try: ok = run_case(*a, **k)[0]
        except Exception as e: ok = False; print("EXC", a[:5], repr(e)[:300], flush=True)
        bad += not ok
    R = lambda along, b: [rot(along // b, b)]
    for di, dt in enumerate(DTS):
        if small and di not in (0, 2, 3): continue
        fp8 = dict(scale=.37) if di >= 3 else {}
        res = lambda o: (torch.rand(o, device=dev) + .5)
        for b in (2, 4, 8, 16, 5, 12) if not small else (4, 8, 16):
            o, c = b * 13, 132
            for delta in (0, 1):
                go(f"oft{b}", "rows", dt, o, c, [(R(o, b), None)], strength=.5, rescale=res(o), delta=delta, **fp8)
            go(f"oft{b} in place", "rows", dt, o, c, [(R(o, b), None)], strength=1., inplace=True, **fp8)
            go(f"oft{b} any", "any", dt, o, 37, [(R(o, b), None)], strength=-.3, rescale=res(o), odd=True, **fp8)
            go(f"oft{b} any1", "any", dt, 45, b * 9, [(R(b * 9, b), None)], axis=1, strength=-.3, tables=True, inplace=True, **fp8)
            c = 8 * b * 3
            for delta in (0, 1): go(f"oft{b} col", "columns", dt, 77, c, [(R(c, b), None)], axis=1, strength=.5, rescale=res(77), delta=delta, **fp8)
            go(f"oft{b} col in place", "columns", dt, 77, c, [(R(c, b), None)], axis=1, inplace=True, **fp8)
        for b, m in ((2, 3), (4, 2), (8, 4), (16, 3), (6, 2)) if not small else ((8, 3),):
            o = b * (1 << (m - 1)) * 3; st = [(R(o, b), p) for p in butterfly(o, b, m)]
            for s in (1., .5, -.3): go(f"boft{b},{m}", "rows", dt, o, 140, st, strength=s, interpolate=1, rescale=res(o), **fp8)
            go(f"boft{b},{m} in place", "rows", dt, o, 300, st, strength=.5, interpolate=1, inplace=True, **fp8)
            go(f"boft{b},{m} delta", "rows", dt, o, 140, st, strength=.5, interpolate=1, delta=1, **fp8)
            go(f"boft{b},{m} any", "any", dt, o, 51, st, strength=.5, interpolate=1, tables=True, rescale=res(o), **fp8)
            if o % 8 == 0: go(f"boft{b},{m} columns", "columns", dt, 51, o, st, axis=1, strength=.5, interpolate=1, inplace=True, rescale=res(51), **fp8)
            go(f"boft{b},{m} large", "large", dt, o, 136, st, strength=.5, interpolate=1, inplace=True, **fp8)
        mixed = ([rot(3, 8), rot(5, 5), rot(2, 16), rot(7, 2)], None); o = 24 + 25 + 32 + 14
        perm = np.random.RandomState(0).permutation(o)
        go("mixed", "rows", dt, o, 136, [mixed], strength=.5, **fp8)
        go("mixed+order", "rows", dt, o, 136, [mixed, ([rot(19, 5)], perm)], strength=.5, rescale=res(o), inplace=True, **fp8)
        go("mixed+order any", "any", dt, 33, o, [mixed, ([rot(19, 5)], perm)], strength=.5, axis=1, odd=True, inplace=True, **fp8)
        for b in (20, 32, 40, 80, 33) if not small else (32,):
            for axis in (0, 1):
                a, x = b * 5, 88
                o, c = (a, x) if axis == 0 else (x, a)
                for delta in (0, 1): go(f"large{b}", "large", dt, o, c, [(R(a, b), None)], axis=axis, strength=.5, rescale=res(o), delta=delta, **fp8)
                go(f"large{b} in place", "large", dt, o, c, [(R(a, b), None)], axis=axis, strength=-.3, inplace=True, interpolate=1, **fp8)
                go(f"large{b} odd", "large", dt, o, c, [(R(a, b), None)], axis=axis, odd=True, inplace=True, **fp8)
                go(f"large{b} order", "large", dt, o, c, [([rot(2, b), rot(3, b)], np.random.RandomState(1).permutation(a))], axis=axis, tables=True, **fp8)
                go(f"large{b} stages", "large", dt, o, c, [(R(a, b), np.random.RandomState(s).permutation(a)) for s in range(3)], axis=axis, strength=.5, interpolate=1, rescale=res(o), inplace=True, **fp8)
        if not small:
            go("4096 all", "any", dt, 4096, 20, [(R(4096, 8), np.random.RandomState(3).permutation(4096)), (R(4096, 4), None)], strength=.5, inplace=True, **fp8)
            go("large 640", "large", dt, 1280, 100, [(R(1280, 640), None)], strength=.5, inplace=True, **fp8)
            go("large 640 axis 1", "large", dt, 100, 1280, [(R(1280, 640), None)], axis=1, strength=.5, inplace=True, **fp8)
            o = 2048; go("boft 16,8", "rows", dt, o, 40, [(R(o, 16), p) for p in butterfly(o, 16, 8)], strength=.5, interpolate=1, inplace=True, **fp8)
            o = 10240; go("10240 all", "large", dt, o, 20, [(R(o, 8), np.random.RandomState(3).permutation(o)), (R(o, 16), None)], strength=.5, inplace=True, **fp8)
    # bits stay
    for di, dt in enumerate(DTS):
        it = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[torch.empty(0, dtype=dt).element_size()]
        for kind, axis in (("rows", 0), ("any", 0), ("columns", 1), ("large", 0), ("large", 1)):
            for what in ("identity", "zero"):
                w = weight(96, 96, dt); w.view(it)[::7, ::5] = weight(96, 96, dt).view(it)[0, 0] & 0
                w[3, 4] = -0.; w[50, 60] = -0.
                b = 32 if kind == "large" else 8
                blocks = torch.eye(b, device=dev).repeat(96 // b, 1, 1).contiguous() if what == "identity" else rot(96 // b, b)
                if what == "zero": w[0, 0] = float("nan")
                out = torch.full((96, 96), float("nan"), device=dev).to(dt)
                job = Job(w, out, [([blocks], None)], axis=axis, strength=0. if what == "zero" else .7)
                for l in plan([job], kind): l()
                torch.cuda.synchronize(); n += 1
                if not torch.equal(out.view(it), w.view(it)): bad += 1; print("FAIL bits", kind, axis, NAMES[di], what, (out.view(it) != w.view(it)).sum().item())
    # stochastic rounding, in a region of a wider weight
    for dt in DTS[3:]:
        codes = torch.arange(256, dtype=torch.uint8, device=dev).view(dt).double(); grid = torch.unique(codes[torch.isfinite(codes)])
        for kind, axis, b in (("rows", 0, 8), ("any", 0, 8), ("columns", 1, 8), ("large", 0, 32), ("large", 1, 32)):
            w = weight(96, 96, dt); out = torch.empty_like(w); pitch, first = 200, 3 * 200 + 7; n += 1
            job = Job(w, out, [([rot(96 // b, b)], None)], axis=axis, strength=.7, stochastic=1, seed=1234567, pitch=pitch, element=first)
            for l in plan([job], kind): l()
            torch.cuda.synchronize()
            v = w.double() + wanted(job, w.double()); v = v.clamp(grid[0], grid[-1])
            at = (np.arange(96)[:, None] * pitch + np.arange(96)[None] + first).astype(np.uint64); M = np.uint64(0xffffffff); pr = at // np.uint64(2)
            x = ((pr & M) * np.uint64(0x9e3779b1) + (pr >> np.uint64(32)) * np.uint64(0x85ebca77) + np.uint64(1234567)) & M
            x ^= x >> np.uint64(16); x = x * np.uint64(0x7feb352d) & M; x ^= x >> np.uint64(15); x = x * np.uint64(0x846ca68b) & M; x ^= x >> np.uint64(16)
            r = torch.from_numpy(((x >> (at % np.uint64(2) * np.uint64(16))) & np.uint64(0xffff)).astype(np.int64)).to(dev)
            mag = v.abs(); pos = grid[grid >= 0]; lo = torch.searchsorted(pos, mag, right=True) - 1; lo = lo.clamp(0, len(pos) - 2)
            frac = (mag - pos[lo]) / (pos[lo + 1] - pos[lo]); upw = (frac * 65536).floor().long() + r > 65535
            want = torch.where(upw, pos[lo + 1], pos[lo]) * v.sign()
            miss = (want != out.double()).double().mean().item()
            if miss > 3e-3: bad += 1; print("FAIL stochastic", kind, axis, dt, miss)
    print("tests", n, "bad", bad); print({f"{k[0]} {k[1]}": f"{v:.1e}" for k, v in sorted(worst.items())}, flush=True)

def med(f, n=5):
    for _ in range(1): f()
    torch.cuda.synchronize(); r = []
    for _ in range(n):
        a, b = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize(); r.append(a.elapsed_time(b))
    return sorted(r)[len(r) // 2]

def times(which):
    global STEP
    att = attention_set("sdxl"); torch.manual_seed(0)
    dims = [(s[0], int(np.prod(s[1:]))) for _, s in att]
    def one(name, kind, make, axis=0, dt=torch.bfloat16, steps=(128,), goals=(None,), threads=(256,), **kw):
        keep.clear()
        base = [(torch.randn(d, device=dev) * .02).to(dt) for d in dims]; out = [torch.full_like(b, float("nan")) for b in base]
        made = {}; jobs = []
        for w, o in zip(base, out):
            a = w.shape[axis]; st = make(a)
            jobs.append(Job(w, o, st, axis=axis, **kw))
        global STEP
        for STEP in steps:
            for goal, LT in itertools.product(goals, threads):
                globals()['LT'] = LT
                try:
                    t0 = time.time(); ls = plan(jobs, kind, **({} if goal is None else dict(goal=goal))); tp = time.time() - t0
                    f = lambda: [l() for l in ls]
                    f(); torch.cuda.synchronize()
                    e = 0.
                    for i in (0, 5, 300, 721):
                        v = base[i].double(); v = v + wanted(jobs[i], v); g = out[i].double(); sp = spacing(v, dt) * .5
                        e = max(e, (((g - v).abs() - sp).max() / v.abs().max()).item()) if bool(torch.isfinite(g).all()) else float("nan")
                    t = med(f)
                    print(f"{name:16s} {str(dt)[6:]:9s} step {STEP:3d} goal {goal} thr {LT} blocks {ls[0].n} sh {ls[0].shared} {t:.3f} ms {t/copy:.2f}x err {e:.0e}", flush=True)
                except Exception as ex: print(name, "EXC", repr(ex)[:300], flush=True)
    n = sum(a * b for a, b in dims)
    x = torch.randn(n // 64, device=dev).to(torch.bfloat16).repeat(64); y = torch.empty_like(x); copy = med(lambda: y.copy_(x)); print(torch.cuda.get_device_name(), "copy", round(copy, 3), flush=True); del x, y
    cache = {}
    def R(a, b):
        if b not in cache: cache[b] = rot(16, b)
        return [cache[b].repeat(-(-(a // b) // 16), 1, 1)[:a // b].contiguous()]
    orders = {}
    def boft(a, b, m):
        if (a, b, m) not in orders: orders[a, b, m] = butterfly(a, b, m)
        return [(R(a, b), p) for p in orders[a, b, m]]
    which(one, R, boft)

if __name__ == "__main__":
    if "tests" in sys.argv: tests()
    if "small" in sys.argv: tests(True)
    if "times" in sys.argv:
        def which(one, R, boft):
            one("oft 8", "rows", lambda a: [(R(a, 8), None)], strength=.7)
            one("oft 16", "rows", lambda a: [(R(a, 16), None)], strength=.7)
            one("boft 8,4", "rows", lambda a: boft(a, 8, 4), strength=.7, interpolate=1)
            one("boft 8,4 s=1", "rows", lambda a: boft(a, 8, 4), strength=1., interpolate=1)
            one("oft 32", "large", lambda a: [(R(a, 32), None)], threads=(128, 256), strength=.7)
            one("oft 320", "large", lambda a: [(R(a, 320), None)], goals=(320, 640), threads=(256,), strength=.7)
            one("oft 640", "large", lambda a: [(R(a, 640), None)], threads=(256,), strength=.7)
            one("peft oft 8", "columns", lambda a: [(R(a, 8), None)], axis=1, steps=(64,), goals=(128,), strength=.7)
            one("peft boft 8,4", "columns", lambda a: boft(a, 8, 4), axis=1, steps=(64, 128), strength=.7, interpolate=1)
            one("peft oft 32", "large", lambda a: [(R(a, 32), None)], axis=1, threads=(128,), strength=.7)
            one("oft 8", "rows", lambda a: [(R(a, 8), None)], strength=.7, dt=torch.float8_e4m3fn, scale=1.)
        times(which)
