import sys,time,numpy as np,torch,cupy
sys.path.insert(0,"tests/bench")
from shapes import attention_set
pk=cupy.RawModule(path=".scratch/pack.cubin"); ST=int(sys.argv[1]); mg=cupy.RawModule(path=".scratch/merge.cubin" if ST==4 else ".scratch/merge3.cubin")
PACK=pk.get_function("pack")
TARGET=np.dtype([(n,'u8') for n in "base out bc oc br orow".split()]+[(n,'u4') for n in "rows columns first count".split()]+[('scale','f4')]+[(n,'u4') for n in "seed stochastic dtype axis products".split()])
TERM=np.dtype([(n,'u8') for n in "a b a2 b2 gain".split()]+[('coef','f4')]+[(n,'u4') for n in "kind format format2 ranks ranks2 row rows column columns gain_axis inner_rows inner_columns outer_columns plain".split()]+[('carry','f4')])
FACT=np.dtype([(n,'u8') for n in "frm to row column".split()]+[(n,'u4') for n in "dtype layout format rows columns shift blocks ranks".split()])
assert TARGET.itemsize==88 and TERM.itemsize==104 and FACT.itemsize==64
DT={torch.float32:0,torch.float16:1,torch.bfloat16:2}
dev="cuda"
keep=[]
def up(a):
    t=torch.from_numpy(a.view(np.uint8).copy()).to(dev); keep.append(t); return t.data_ptr()
def pack(mats):  # list of (tensor, layout)
    f=np.zeros(len(mats),FACT); outs=[]
    for i,(m,layout) in enumerate(mats):
        fmt={torch.float32:2,torch.float16:1,torch.bfloat16:0}[m.dtype]; parts=3 if fmt==2 else 1
        r,c=m.shape
        if layout==0: blocks,ranks=-(-r//16),-(-c//16); n=blocks*ranks*parts*512
        else: blocks,ranks=-(-c//32),-(-r//16); n=blocks*ranks*parts*1024
        o=torch.empty(n,dtype=torch.uint8,device=dev); outs.append((o,fmt,ranks))
        f[i]=(m.data_ptr(),o.data_ptr(),m.stride(0),m.stride(1),DT[m.dtype],layout,fmt,r,c,0,blocks,ranks)
    p=up(f)
    PACK((64,len(mats),1),(256,1,1),(np.uint64(p),)); 
    return outs
def med(f,n=9):
    for _ in range(2): f()
    torch.cuda.synchronize(); r=[]
    for _ in range(n):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize(); r.append(a.elapsed_time(b))
    return sorted(r)[len(r)//2]
def randn(s,scale,dt): return (torch.randn(s,device=dev)*scale).to(dt)
STRIP=16
def tables(W,base,termlists,single=0,rows=64):
    T=np.zeros(len(W),TARGET); terms=[]; tiles=[]
    for i,(w,b) in enumerate(zip(W,base)):
        O=w.shape[0]; C=w.numel()//O
        T[i]=(b.data_ptr(),w.data_ptr(),0,0,C,C,O,C,len(terms),len(termlists[i]),1.0,0,0,DT.get(w.dtype,3),0,sum(1 for t in termlists[i] if t[6]<2))
        terms+=termlists[i]
        R=-(-O//rows); n=-(-C//64)
        for ct in range(0,n,STRIP):
            q=np.zeros((R,4),np.uint32); q[:,0]=i; q[:,1]=np.arange(R); q[:,2]=ct; q[:,3]=min(STRIP,n-ct); tiles.append(q)
    tl=np.concatenate(tiles)
    tm=np.array(terms,dtype=TERM)
    return up(T),up(tm),up(tl),len(tl)
def term(O,C,coef,kind,a=0,b=0,a2=0,b2=0,gain=0,fmt=0,fmt2=0,ranks=0,ranks2=0,inner=(0,0,0),plain=0,carry=1.0):
    return (a,b,a2,b2,gain,coef,kind,fmt,fmt2,ranks,ranks2,0,O,0,C,0,*inner,plain,carry)
def run(fn,tb,room=0):
    k=mg.get_function(fn)
    base=0 if fn=="merge_any" else ST*((8192 if "full" in fn or "plain" in fn else 16384)+6144)
    sm=base+4*room*512
    if sm>49152 and k.max_dynamic_shared_size_bytes<sm: k.max_dynamic_shared_size_bytes=sm
    args=(np.uint64(tb[0]),np.uint64(tb[1]),np.uint64(tb[2]))
    if fn!="merge_any": args+=(np.uint32(room),)
    k((tb[3],1,1),(128,1,1),args,shared_mem=sm)
def err(W,base,delta,idx):
    got=per=0.
    for i in idx:
        want=base[i].double().view(base[i].shape[0],-1)+delta(i)
        g=W[i].double().view_as(want); got+=(g-want).square().sum().item(); per+=(want.to(W[i].dtype).double()-want).square().sum().item()
    return (got/max(per,1e-300))**.5, 
def main():
    att=attention_set("sdxl"); dt=torch.bfloat16
    torch.manual_seed(0)
    base=[randn(s,.02,dt) for _,s in att]; W=[torch.full_like(b,float('nan')) for b in base]
    n=sum(b.numel() for b in base); idx=[0,5,100,300,600,721]
    flat=torch.randn(n//1024*1024,device=dev).to(dt); dst=torch.empty_like(flat)
    copy=med(lambda:dst.copy_(flat)); print(torch.cuda.get_device_name(),"params",n,"copy ms",round(copy,3)); del flat,dst
    def rep(name,fn,tb,delta,room=0):
        for w in W: w.fill_(float('nan'))
        run(fn,tb,room); torch.cuda.synchronize(); e=err(W,base,delta,idx)
        t=med(lambda:run(fn,tb,room)); print(f"{name:28s} {fn:16s} room {room:3d} {t:7.3f} ms {t/copy:5.2f}x err {e[0]:.4f}",flush=True)
    dims=[(b.shape[0],b.numel()//b.shape[0]) for b in base]
    import os
    for r,k,fdt in ((int(os.environ['NCU']),int(os.environ.get('NK','1')),dt),) if 'NCU' in os.environ else ((32,1,dt),(128,1,dt),(32,5,dt),(8,1,dt),(32,1,torch.float16),(32,1,torch.float32)):
        lo=[[(randn((O,r),.1,fdt),randn((r,C),.1,fdt)) for O,C in dims] for _ in range(k)]
        pk_=[pack([(m,l) for u,d in L for m,l in ((u,0),(d,1))]) for L in lo]
        tl=[[term(*dims[i],.5,0,a=p[2*i][0].data_ptr(),b=p[2*i+1][0].data_ptr(),fmt=p[2*i][1],ranks=p[2*i][2]) for p in pk_] for i in range(len(W))]
        tb=tables(W,base,tl); tb2=tables(W,base,tl,rows=128)
        d=lambda i:sum(.5*(L[i][0].double()@L[i][1].double()) for L in lo)
        K=-(-r//16)*k
        for room in (2*K,):
            if fdt!=torch.float32: rep(f"lora r{r} x{k} {fdt}","merge_bf16",tb2,d,room)
        rep(f"lora r{r} x{k} {fdt}","merge_bf16_full",tb,d,K*(3 if fdt==torch.float32 else 1))
        if k==1 and r==32 and fdt==dt: rep(f"lora r{r} x{k} {fdt}","merge_any",tb,d)
        del lo,pk_; keep.clear()
    if 'NCU' in os.environ: return
    # loha
    r=32; lo=[[(randn((O,r),.1,dt),randn((r,C),.1,dt)) for O,C in dims] for _ in range(2)]
    pk_=[pack([(m,l) for u,d in L for m,l in ((u,0),(d,1))]) for L in lo]
    tl=[[term(*dims[i],.5,1,a=pk_[0][2*i][0].data_ptr(),b=pk_[0][2*i+1][0].data_ptr(),a2=pk_[1][2*i][0].data_ptr(),b2=pk_[1][2*i+1][0].data_ptr(),fmt=0,fmt2=0,ranks=2,ranks2=2)] for i in range(len(W))]
    rep("loha","merge_bf16_full",tables(W,base,tl),lambda i:.5*(lo[0][i][0].double()@lo[0][i][1].double())*(lo[1][i][0].double()@lo[1][i][1].double()),4)
    del lo,pk_; keep.clear()
    kr=[(randn((8,8),.2,dt),randn((O//8,C//8),.2,dt)) for O,C in dims]
    for plain in (1,):
        tl=[[term(*dims[i],.5,2,a=kr[i][0].data_ptr(),b=kr[i][1].data_ptr(),fmt=2,fmt2=2,inner=(dims[i][0]//8,dims[i][1]//8,8),plain=plain)] for i in range(len(W))]
        rep(f"lokr plain={plain}","merge_bf16_plain",tables(W,base,tl,1-plain),lambda i:.5*torch.kron(kr[i][0].double(),kr[i][1].double()))
    full=[randn(d,.02,dt) for d in dims]
    tl=[[term(*dims[i],.5,3,a=full[i].data_ptr(),fmt=2,plain=1)] for i in range(len(W))]
    rep("full","merge_bf16_plain",tables(W,base,tl),lambda i:.5*full[i].double())
    del full
    v=[randn((C,),.2,torch.float32) for O,C in dims]
    tl=[[term(*dims[i],.5,5,a=v[i].data_ptr(),plain=1)] for i in range(len(W))]
    rep("ia3","merge_bf16_plain",tables(W,base,tl),lambda i:.5*v[i].double()[None]*base[i].double().view(base[i].shape[0],-1))
if __name__=="__main__": main()
