"""b.py CHECKS PERF VARIANT...  (VARIANT: name of a cubin in this folder, or old)"""
import sys,os,time,numpy as np,torch,cupy,random
sys.path.insert(0,"tests/bench")
from shapes import attention_set
D=os.path.dirname(os.path.abspath(__file__))
pk=cupy.RawModule(path=D+"/pack.cubin"); PACK=pk.get_function("pack")
TARGET=np.dtype([(n,'u8') for n in "base out bc oc br orow".split()]+[(n,'u4') for n in "rows columns first count".split()]+[('scale','f4')]+[(n,'u4') for n in "seed stochastic dtype axis products".split()])
TERM=np.dtype([(n,'u8') for n in "a b a2 b2 gain".split()]+[('coef','f4')]+[(n,'u4') for n in "kind format format2 ranks ranks2 row rows column columns gain_axis inner_rows inner_columns outer_columns plain".split()]+[('carry','f4')])
FACT=np.dtype([(n,'u8') for n in "frm to row column".split()]+[(n,'u4') for n in "dtype layout format rows columns shift blocks ranks".split()])
E4,E5=torch.float8_e4m3fn,torch.float8_e5m2
DT={torch.float32:0,torch.float16:1,torch.bfloat16:2,E4:3,E5:4}; NAME=["f32","f16","bf16","e4m3","e5m2"]; SIZE={torch.float32:4,torch.float16:2,torch.bfloat16:2,E4:1,E5:1}
FMT={torch.float32:2,torch.float16:1,torch.bfloat16:0}
dev="cuda"; keep=[]
def up(a):
    t=torch.from_numpy(a.view(np.uint8).copy()).to(dev); keep.append(t); return t.data_ptr()
def pack(mats): # (tensor, layout, shift) -> (buffer, fmt, ranks)
    f=np.zeros(len(mats),FACT); outs=[]
    for i,(m,layout,shift) in enumerate(mats):
        fmt=FMT[m.dtype]; parts=3 if fmt==2 else 1; r,c=m.shape
        if layout==0: blocks,ranks=-(-(r+shift)//16),-(-c//16); n=blocks*ranks*parts*512
        else: blocks,ranks=-(-(c+shift)//32),-(-r//16); n=blocks*ranks*parts*1024
        o=torch.empty(n,dtype=torch.uint8,device=dev); outs.append((o,fmt,ranks)); keep.append(o); keep.append(m)
        f[i]=(m.data_ptr(),o.data_ptr(),m.stride(0),m.stride(1),DT[m.dtype],layout,fmt,r,c,shift,blocks,ranks)
    PACK((64,len(mats),1),(256,1,1),(np.uint64(up(f)),)); return outs
def med(f,n=7):
    for _ in range(2): f()
    torch.cuda.synchronize(); r=[]
    for _ in range(n):
        a,b=torch.cuda.Event(enable_timing=True),torch.cuda.Event(enable_timing=True)
        a.record(); f(); b.record(); b.synchronize(); r.append(a.elapsed_time(b))
    return sorted(r)[len(r)//2]
def randn(s,scale,dt): return (torch.randn(s,device=dev)*scale).to(dt)
KIND=dict(low=0,had=1,kron=2,dense=3,rows=4,cols=5,rep=6)
def term(coef,kind,region,a=0,b=0,a2=0,b2=0,gain=0,fmt=0,fmt2=0,ranks=0,ranks2=0,axis=0,inner=(0,0,0),plain=0,carry=1.0):
    r,R,c,C=region; return (a,b,a2,b2,gain,coef,kind,fmt,fmt2,ranks,ranks2,r,R,c,C,axis,*inner,plain,carry)
class Variant:
    def __init__(s,name):
        s.name=name; s.old=name.startswith("old"); s.m=cupy.RawModule(path=f"{D}/{name}.cubin")
        s.cfg=dict(tiles=1,ptiles=2,ftiles=1,slots=4,fp=2,ff=3,across=2,across8=1,late=1); p=D+f"/{name}.cfg"
        if os.path.exists(p): s.cfg.update(eval(open(p).read()))
    def rows(s,fn): return 128 if fn.split("_",1)[1] in("f16","bf16","e4m3","e5m2") else 64
    def launch(s,fn,tb,room,sync=False):
        kind=fn.split("_"); real=fn
        if not s.old and fn!="merge_any":
            b={"f32":"32","f16":"16","bf16":"16","e4m3":"8","e5m2":"8"}[kind[1]]
            if len(kind)>2 or b!="8": real="_".join(["merge",b]+kind[2:])
        k=s.m.get_function(real)
        args=tuple(np.uint64(x) for x in tb[:3])
        if fn=="merge_any": return k((tb[3],1,1),(128,1,1),args)
        size={"f32":4,"f16":2,"bf16":2,"e4m3":1,"e5m2":1}[kind[1]]; v=kind[2] if len(kind)>2 else ""
        c=s.cfg; tile=(8 if v=="" and size<4 else 4)*128*8*size; th=128; ac=c['across8'] if size==1 else c['across']; P=tb[4]
        if s.old: sm=3*(tile+6144)+4*room*512
        elif v=="plain": sm=c['ptiles']*tile
        elif v=="": sm=ac*(c['tiles']*tile+c['slots']*c['fp']*2048)+room*2048+96*P; th=128*ac
        else: sm=c['ftiles']*tile+c['slots']*c['ff']*2048+16384+room*2048+96*P
        most=227*1024-1500
        while sm>min(most,c.get('most',most)): room-=1; sm-=2048
        if k.max_dynamic_shared_size_bytes<sm: k.max_dynamic_shared_size_bytes=sm
        k((tb[3],1,1),(th,1,1),args+(np.uint32(room),),shared_mem=sm)
def strips(targets,rows,STRIP=16):
    tl=[]
    for i,(O,C) in enumerate(targets):
        R=-(-O//rows); n=-(-C//64); k=-(-n//STRIP); step=-(-n//k); step+=step%2 if STRIP>1 else 0
        for ct in range(0,n,step):
            q=np.zeros((R,4),np.uint32); q[:,0]=i; q[:,1]=np.arange(R); q[:,2]=ct; q[:,3]=min(step,n-ct); tl.append(q)
    return np.concatenate(tl)
# ---------------- correctness
def spacing(x,dt):
    M,emin={torch.float16:(10,-14),torch.bfloat16:(7,-126),torch.float32:(23,-126),E4:(3,-6),E5:(2,-14)}[dt]
    return 2.0**(torch.floor(torch.log2(x.abs().clamp_min(2.0**emin)))-M)
def check(v,rng,dt,kind,stoch=False,n=24):
    """one launch of n small targets"""
    fn="merge_any" if kind=="any" else f"merge_{NAME[DT[dt]]}"+("" if kind=="products" else "_"+kind)
    T=np.zeros(n,TARGET); terms=[]; cases=[]; room=0; dims=[]; mats=[]
    g=lambda a,b: rng.randint(a,b)
    for i in range(n):
        O=g(1,200); C=8*g(1,40) if kind!="any" else g(1,150); dims.append((O,C))
        scale=1.0 if SIZE[dt]>1 else rng.choice([1.0,1.0,0.37])
        pad=8*g(0,2) if SIZE[dt]>1 else 16*g(0,1)
        pitch=C+pad if kind!="any" else C+g(0,3)
        w=randn((O,pitch),.5/scale if SIZE[dt]==1 else .5,torch.float32)
        w=w.to(dt); raw=w.view({4:torch.int32,2:torch.int16,1:torch.uint8}[SIZE[dt]])
        # specials: -0, NaN with a payload
        msk=torch.rand(O,pitch,device=dev); raw[msk<.02]={4:-2**31,2:-2**15,1:0x80}[SIZE[dt]]; raw[(msk>.02)&(msk<.03)]={4:0x7fc12345,2:0x7fe1,1:0x7f if dt==E4 else 0x7e}[SIZE[dt]]
        inplace=rng.random()<.3; out=w.clone() if inplace else w; 
        if inplace: base=out; opitch=pitch
        else:
            base=w.clone(); opitch=pitch; out=torch.empty_like(w); out.view(raw.dtype).fill_(0x55)
        before=out.clone(); w0=base.clone(); keep.extend([base,out])
        W=w0[:,:C].double()*scale; delta=torch.zeros(O,C,dtype=torch.float64,device=dev); mag=torch.zeros_like(delta); touched=torch.zeros(O,C,dtype=torch.bool,device=dev)
        specs=[]; nk=g(1,4) if kind!="plain" else 0
        coefs=sorted(rng.choice([.25,.5,.5,1.0]) for _ in range(nk))
        used=0
        for c in coefs:
            if kind=="products":
                reg=[0,O,0,C]
                if rng.random()<.4:
                    r=32*g(0,(O-1)//32); R=O-r if rng.random()<.5 else min(O-r,32*g(1,3)); cc=64*g(0,(C-1)//64); CC=C-cc if rng.random()<.5 else min(C-cc,64*g(1,2)); reg=[r,R,cc,CC]
                k="low"; fds=[rng.choice([torch.bfloat16,torch.float16])]
            else:
                reg=[0,O,0,C]
                if rng.random()<.5:
                    r=g(0,O-1); cc=g(0,C-1); reg=[r,g(1,O-r),cc,g(1,C-cc)]
                k=rng.choice(["low","had"]); fds=[rng.choice([torch.bfloat16,torch.float16,torch.float32]) for _ in range(2 if k=="had" else 1)]
            r,R,cc,CC=reg; prods=[]; mags=[]; pr=[]
            zero=torch.rand(R,device=dev)<.1
            for fd in fds:
                rank=rng.choice([1,4,8,16,20,33,64,70]); u=randn((R,rank),.3,fd); d=randn((rank,CC),.3,fd)
                if k=="low": u[zero]=0
                mats += [(u,0,r%16),(d,1,cc%32)]; pr.append((len(mats)-2,len(mats)-1,fd,rank)); prods.append(u.double()@d.double()); mags.append(u.double().abs()@d.double().abs())
                used+=(-(-rank//16))*(3 if fd==torch.float32 else 1)
            P=prods[0]*(prods[1] if k=="had" else 1); MG=mags[0]*(mags[1] if k=="had" else 1)
            gain=0; axis=0; gv=1
            if kind!="products" and rng.random()<.5:
                axis=g(0,1); gt=randn((R if axis==0 else CC,),1.,torch.float32); keep.append(gt); gain=gt.data_ptr(); gv=gt.double()[:,None] if axis==0 else gt.double()[None]
            delta[r:r+R,cc:cc+CC]+=c*P*gv; mag[r:r+R,cc:cc+CC]+=(c*MG*gv).abs(); tz=torch.ones(R,CC,dtype=torch.bool,device=dev); 
            if k=="low": tz[zero]=False
            touched[r:r+R,cc:cc+CC]|=tz
            specs.append((c,k,reg,pr,gain,axis))
        room=max(room,used*(2 if kind=="products" and SIZE[dt]<4 else 1))
        T[i]=(base.data_ptr(),out.data_ptr(),0,0,pitch,opitch,O,C,0,0,scale,g(0,2**32-1),int(stoch),DT[dt],0,nk)
        pl=[]
        if kind!="products":
            for _ in range(g(0 if kind!="plain" else 0,2)):
                k=rng.choice(["dense","rows","cols","kron"]+(["rep"] if kind=="any" else [])); c=rng.choice([.5,1.0]); reg=[0,O,0,C]
                if kind=="any" and rng.random()<.5: r=g(0,O-1); cc=g(0,C-1); reg=[r,g(1,O-r),cc,g(1,C-cc)]
                r,R,cc,CC=reg; fd=rng.choice([torch.bfloat16,torch.float16,torch.float32]); sl=(slice(r,r+R),slice(cc,cc+CC))
                if k=="rep" and any(p[1]=="rep" for p in pl): continue
                if k in("dense","rep"): m=randn((R,CC),.5,fd); keep.append(m); pl.append((c,k,reg,dict(a=m.data_ptr(),fmt=DT[fd]))); X=m.double(); 
                elif k=="rows": m=randn((R,),.5,torch.float32); keep.append(m); pl.append((c,k,reg,dict(a=m.data_ptr()))); X=m.double()[:,None]*W[sl]
                elif k=="cols": m=randn((CC,),.5,torch.float32); keep.append(m); pl.append((c,k,reg,dict(a=m.data_ptr()))); X=m.double()[None]*W[sl]
                else:
                    if kind!="any":
                        f=rng.choice([q for q in (1,2,3,4,5,8) if CC%q==0 and CC//q%8==0]); 
                    else: f=rng.choice([q for q in (1,2,3,4,5) if CC%q==0])
                    h=rng.choice([q for q in (1,2,3,5,7) if R%q==0]); f1=rng.choice([torch.bfloat16,torch.float32])
                    a=randn((h,f),.7,f1); b=randn((R//h,CC//f),.7,fd); keep.extend([a,b]); X=torch.kron(a.double(),b.double())
                    pl.append((c,k,reg,dict(a=a.data_ptr(),b=b.data_ptr(),fmt=DT[f1],fmt2=DT[fd],inner=(R//h,CC//f,f))))
                if k=="rep": delta[sl]+=c*(X-W[sl]); mag[sl]+=c*(X.abs()+W[sl].abs()); touched[sl]=True
                else: delta[sl]+=c*X; mag[sl]+=(c*X).abs(); touched[sl]|=(X!=0)|X.isnan()
        cases.append((O,C,W,delta,mag,touched,base,out,before,w0,scale,inplace,specs,pl))
    outs=pack(mats) if mats else []
    for i,cs in enumerate(cases):
        T[i]['first']=len(terms); T[i]['count']=len(cs[12])+len(cs[13])
        prev=None
        for c,k,reg,pr,gain,axis in cs[12]:
            kw=dict(a=outs[pr[0][0]][0].data_ptr(),b=outs[pr[0][1]][0].data_ptr(),fmt=outs[pr[0][0]][1],ranks=outs[pr[0][0]][2])
            if k=="had": kw.update(a2=outs[pr[1][0]][0].data_ptr(),b2=outs[pr[1][1]][0].data_ptr(),fmt2=outs[pr[1][0]][1],ranks2=outs[pr[1][0]][2])
            terms.append(term(c,KIND[k],reg,gain=gain,axis=axis,carry=1.0 if prev is None else prev/c,**kw)); prev=c
        for c,k,reg,kw in cs[13]: terms.append(term(c,KIND[k],reg,plain=1,**kw))
    sl=strips(dims,v.rows(fn) if kind!="any" else 64,rng.choice([1,2,16])); perm=np.random.permutation(len(sl)); sl=sl[perm]
    tm=np.array(terms,dtype=TERM) if terms else np.zeros(1,TERM)
    rm=rng.choice([0,room//2,room])
    v.launch(fn,(up(T),up(tm),up(sl),len(sl),int(T['products'].max())),rm); torch.cuda.synchronize()
    bad=0
    for i,(O,C,W,delta,mag,touched,base,out,before,w0,scale,inplace,specs,pl) in enumerate(cases):
        iv={4:torch.int32,2:torch.int16,1:torch.uint8}[SIZE[dt]]
        got=out[:,:C].double(); rb=out.view(iv); why=[]
        if not torch.equal(rb[:,C:],before.view(iv)[:,C:]): why.append("gap written")
        if not torch.equal(rb[:,:C][~touched],w0.view(iv)[:,:C][~touched]): why.append("bits changed where nothing is added")
        want=(W+delta)/scale; lim=448. if dt==E4 else 57344. if dt==E5 else None
        if lim: want=want.clamp(-lim,lim)
        nn=want.isnan(); 
        if not (got.isnan()|~nn|~touched).all(): why.append("NaN lost")
        ok=~nn&touched&(delta!=0)
        q=want.float().to(dt).double(); e=(got-want).abs(); tol=2e-5*(mag/scale+want.abs())+1e-30
        b=(q-want).abs()+tol if not stoch else spacing(want,dt)+tol
        if dt==torch.float32: b=3e-6*(mag+W.abs())+1e-30
        w=(~(e<=b)&ok)
        if w.any(): why.append(f"{int(w.sum())} of {int(ok.sum())} off, worst {float((e/b)[w].max()):.3g} rows {sorted(set(w.nonzero()[:,0].tolist()))[:6]} cols {sorted(set(w.nonzero()[:,1].tolist()))[:6]}")
        if why: bad+=1; 
        if why and bad<3: print("  BAD",v.name,fn,"target",i,(O,C),"scale",scale,"inplace",inplace,"room",rm,"specs",[(s[1],s[2],[(p[2],p[3]) for p in s[3]],bool(s[4]),s[5]) for s in specs],[(p[1],p[2]) for p in pl],why,flush=True)
    return bad
def checks(v,n,small=False):
    rng=random.Random(7); torch.manual_seed(7); np.random.seed(7); tot=0; t0=time.time()
    for dt in (torch.bfloat16,torch.float16,torch.float32,E4,E5):
        for kind in ("products","plain","full","any"):
            if kind=="any" and v.old: pass
            bad=0
            for i in range(n): bad+=check(v,rng,dt,kind,stoch=SIZE[dt]==1 and i%2==1,n=6 if small else 24); keep.clear()
            tot+=bad
            if bad: print(f"  {v.name} {NAME[DT[dt]]} {kind}: {bad} BAD")
    print(f"checks {v.name}: {'all good' if not tot else str(tot)+' BAD'} ({time.time()-t0:.1f} s)",flush=True)
# ---------------- speed
def perf(vs,only):
    att=attention_set("sdxl"); dt=torch.bfloat16; torch.manual_seed(0)
    dims=[(s[0],int(np.prod(s[1:]))) for _,s in att]
    base=[randn(d,.02,dt) for d in dims]; W=[torch.empty_like(b) for b in base]
    n=sum(b.numel() for b in base); idx=[0,5,300,721]
    flat=torch.randn(n//1024*1024,device=dev).to(dt); dst=torch.empty_like(flat)
    copy=med(lambda:dst.copy_(flat)); f8=flat.view(torch.uint8)[:n]; d8=dst.view(torch.uint8)[:n]; copy8=med(lambda:d8.copy_(f8)); print(torch.cuda.get_device_name(),"copy ms",round(copy,3),"fp8",round(copy8,3)); del flat,dst,f8,d8
    res={}
    def rep(name,fn,tl,delta,room,W=W,base=base,stoch=0,copy=copy):
        if only and not any(name.startswith(o) for o in only): return
        line=f"{name:22s}"
        for v in vs:
            T=np.zeros(len(W),TARGET); terms=[]
            for i,(w,b) in enumerate(zip(W,base)):
                O,C=dims[i]; T[i]=(b.data_ptr(),w.data_ptr(),0,0,C,C,O,C,len(terms),len(tl[i]),1.0,i*7919,stoch,DT[w.dtype],0,sum(1 for t in tl[i] if t[6]<2)); terms+=tl[i]
            sl=strips(dims,v.rows(fn),v.cfg.get('strip',16)); tb=(up(T),up(np.array(terms,dtype=TERM)),up(sl),len(sl),int(T['products'].max()))
            for w in W: w.view(torch.uint8).fill_(0xff)
            v.launch(fn,tb,room); torch.cuda.synchronize()
            got=per=0.
            for i in idx:
                want=base[i].double()+delta(i); got+=(W[i].double()-want).square().sum().item(); per+=(want.float().to(W[i].dtype).double()-want).square().sum().item()
            t=med(lambda:v.launch(fn,tb,room)); e=(got/per)**.5
            line+=f"  {t:6.3f} {t/copy:5.3f}x {'' if abs(e-1)<1e-3 else 'err %.4f'%e}"
        print(line,flush=True)
    def lowrank(name,r,k,fdt,fn=None,carry=False,**kw):
        if only and not any(name.startswith(o) for o in only): return
        lo=[[(randn((O,r),.1,fdt),randn((r,C),.1,fdt)) for O,C in dims] for _ in range(k)]
        pk_=[pack([(m,l,0) for u,d in L for m,l in ((u,0),(d,1))]) for L in lo]
        cf=[.5*(1+.1*j) if carry else .5 for j in range(k)]
        tl=[[term(cf[j],0,(0,dims[i][0],0,dims[i][1]),a=p[2*i][0].data_ptr(),b=p[2*i+1][0].data_ptr(),fmt=p[2*i][1],ranks=p[2*i][2],carry=1.0 if j==0 else cf[j-1]/cf[j]) for j,p in enumerate(pk_)] for i in range(len(W))]
        K=-(-r//16)*k; full=fdt==torch.float32 or (fn or "").endswith("full")
        rep(name,fn or ("merge_bf16_full" if full else "merge_bf16"),tl,lambda i:sum(c*(L[i][0].double()@L[i][1].double()) for c,L in zip(cf,lo)),K*(3 if fdt==torch.float32 else 1)*(1 if full else 2),**kw); keep.clear()
    lowrank("r32",32,1,dt); lowrank("r128",128,1,dt); lowrank("5xr32",32,5,dt); lowrank("5carry",32,5,dt,carry=True); lowrank("r8",8,1,dt); lowrank("r20",20,1,dt); lowrank("f16r32",32,1,torch.float16); lowrank("20xr32",32,20,dt); lowrank("10xr32",32,10,dt); lowrank("r256",256,1,dt); lowrank("r32full",32,1,dt,"merge_bf16_full"); lowrank("fp32r32",32,1,torch.float32)
    whole=[(0,O,0,C) for O,C in dims]; r=32
    lo=[[(randn((O,r),.1,dt),randn((r,C),.1,dt)) for O,C in dims] for _ in range(2)]
    pk_=[pack([(m,l,0) for u,d in L for m,l in ((u,0),(d,1))]) for L in lo]
    tl=[[term(.5,1,whole[i],a=pk_[0][2*i][0].data_ptr(),b=pk_[0][2*i+1][0].data_ptr(),a2=pk_[1][2*i][0].data_ptr(),b2=pk_[1][2*i+1][0].data_ptr(),ranks=2,ranks2=2)] for i in range(len(W))]
    rep("loha","merge_bf16_full",tl,lambda i:.5*(lo[0][i][0].double()@lo[0][i][1].double())*(lo[1][i][0].double()@lo[1][i][1].double()),4)
    gn=[randn((O,),.2,torch.float32)+1 for O,C in dims]; sc=[randn((O,),.1,torch.float32) for O,C in dims]
    tl=[[term(.5,0,whole[i],a=pk_[0][2*i][0].data_ptr(),b=pk_[0][2*i+1][0].data_ptr(),ranks=2,gain=gn[i].data_ptr()),term(.5,4,whole[i],a=sc[i].data_ptr(),plain=1)] for i in range(len(W))]
    rep("dora","merge_bf16_full",tl,lambda i:.5*(lo[0][i][0].double()@lo[0][i][1].double())*gn[i].double()[:,None]+.5*sc[i].double()[:,None]*base[i].double(),2)
    for nm,ed in (("e4m3",E4),("e5m2",E5)):
        b8=[b.float().to(ed) for b in base]; w8=[torch.empty_like(b) for b in b8]
        tl=[[term(.5,0,whole[i],a=pk_[0][2*i][0].data_ptr(),b=pk_[0][2*i+1][0].data_ptr(),ranks=2)] for i in range(len(W))]
        for st in (1,0): rep(nm+(" stochastic" if st else " nearest"),"merge_"+nm,tl,lambda i:.5*(lo[0][i][0].double()@lo[0][i][1].double()),4,W=w8,base=b8,stoch=st,copy=copy8)
        del b8,w8
    del lo,pk_; keep.clear()
    kr=[(randn((8,8),.2,dt),randn((O//8,C//8),.2,dt)) for O,C in dims]
    tl=[[term(.5,2,whole[i],a=kr[i][0].data_ptr(),b=kr[i][1].data_ptr(),fmt=2,fmt2=2,inner=(dims[i][0]//8,dims[i][1]//8,8),plain=1)] for i in range(len(W))]
    rep("lokr","merge_bf16_plain",tl,lambda i:.5*torch.kron(kr[i][0].double(),kr[i][1].double()),0)
    v_=[randn((C,),.2,torch.float32) for O,C in dims]
    tl=[[term(.5,5,whole[i],a=v_[i].data_ptr(),plain=1)] for i in range(len(W))]
    rep("ia3","merge_bf16_plain",tl,lambda i:.5*v_[i].double()[None]*base[i].double(),0)
    full=[randn(d,.02,dt) for d in dims]
    tl=[[term(.5,3,whole[i],a=full[i].data_ptr(),fmt=2,plain=1)] for i in range(len(W))]
    rep("full","merge_bf16_plain",tl,lambda i:.5*full[i].double(),0)
if __name__=="__main__":
    nchk=int(sys.argv[1]); only=[] if sys.argv[2]=="all" else sys.argv[2].split(","); vs=[]
    for nme in sys.argv[3:]:
        vs.append(Variant(nme))
    for v in vs:
        try:
            if nchk>0: checks(v,nchk)
            if nchk<0: checks(v,-nchk,small=True)
        except Exception as ex: print(v.name,"CHECK FAILED",repr(ex)[:500])
    if sys.argv[2]!="none":
        print(f"{'':22s}","  ".join(f"{v.name:>15s}" for v in vs)); perf(vs,only)
