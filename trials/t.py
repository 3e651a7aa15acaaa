import sys,time,numpy as np,torch,cupy
t00=time.time()
sys.path.insert(0,"tests/bench")
from shapes import attention_set
D=".scratch/tensors/"
V=sys.argv[2] if len(sys.argv)>2 else ""
pk=cupy.RawModule(path=D+"pack.cu.sm_90.cubin"); sq=cupy.RawModule(path=D+f"squares{V}.cu.sm_90.cubin"); rt=cupy.RawModule(path=D+f"right{V}.cu.sm_90.cubin")
PACK=pk.get_function("pack"); RIGHT=rt.get_function("right"); GAINS=sq.get_function("gains")
TARGET=np.dtype([(n,'u8') for n in "base out bc oc br orow".split()]+[(n,'u4') for n in "rows columns first count".split()]+[('scale','f4')]+[(n,'u4') for n in "seed stochastic dtype axis products".split()])
TERM=np.dtype([(n,'u8') for n in "a b a2 b2 gain".split()]+[('coef','f4')]+[(n,'u4') for n in "kind format format2 ranks ranks2 row rows column columns gain_axis inner_rows inner_columns outer_columns plain".split()]+[('carry','f4')])
FACT=np.dtype([(n,'u8') for n in "frm to row column".split()]+[(n,'u4') for n in "dtype layout format rows columns shift blocks ranks taps unused".split()])
NORM=np.dtype([(n,'u8') for n in "partial magnitude gain less".split()]+[(n,'u4') for n in "count parts stride taps".split()])
RJ=np.dtype([(n,'u8') for n in "base bc a1 out br".split()]+[(n,'u4') for n in "rows channels taps ranks dtype format shift plain".split()]+[('scale','f4'),('unused','u4')])
assert TARGET.itemsize==88 and TERM.itemsize==104 and FACT.itemsize==72 and NORM.itemsize==48 and RJ.itemsize==80
DT={torch.float32:0,torch.float16:1,torch.bfloat16:2,torch.float8_e4m3fn:3,torch.float8_e5m2:4}
NAME=["f32","f16","bf16","e4m3","e5m2"]; SZ=[4,2,2,1,1]
dev="cuda"; keep=[]
torch.backends.cuda.matmul.allow_tf32=False
torch.manual_seed(0)
def up(a):
    t=torch.from_numpy(np.ascontiguousarray(a).view(np.uint8).copy()).to(dev); keep.append(t); return t.data_ptr()
def FMT(m): return {torch.float32:2,torch.float16:1,torch.bfloat16:0}[m.dtype]
def pack(jobs):  # (matrix view, layout, fmt, shift, taps)
    f=np.zeros(len(jobs),FACT); outs=[]
    for i,(m,layout,fmt,shift,taps) in enumerate(jobs):
        parts=3 if fmt==2 else 1; r,c=m.shape
        if layout==0: blocks,ranks=-(-(r+shift)//16),-(-c//16); n=blocks*ranks*parts*512
        elif layout==1: blocks,ranks=-(-(c*taps+shift)//32),-(-r//16)*taps; n=blocks*ranks*parts*1024
        else: blocks,ranks=-(-r//16),-(-c//32)*2; n=blocks*ranks*parts*512
        o=torch.full((n,),255,dtype=torch.uint8,device=dev); outs.append((o,fmt,blocks,ranks)); keep.append(m)
        f[i]=(m.data_ptr(),o.data_ptr(),m.stride(0),m.stride(1),DT[m.dtype],layout,fmt,r,c,shift,blocks,ranks,taps,0)
    PACK((64,len(jobs),1),(256,1,1),(np.uint64(up(f)),)); keep.extend(o[0] for o in outs)
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
def strips(dims):
    out=[]
    for i,(O,C) in enumerate(dims):
        R=-(-O//64); n=-(-C//64)
        for ct in range(0,n,STRIP):
            q=np.zeros((R,4),np.uint32); q[:,0]=i; q[:,1]=np.arange(R); q[:,2]=ct; q[:,3]=min(STRIP,n-ct); out.append(q)
    return np.concatenate(out)
def term(coef,kind,O,C,row=0,col=0,a=0,b=0,a2=0,b2=0,fmt=0,fmt2=0,ranks=0,ranks2=0,inner=(0,0,0),plain=0):
    return (a,b,a2,b2,0,coef,kind,fmt,fmt2,ranks,ranks2,row,O,col,C,0,*inner,plain,1.0)
MAG=[None]; bad=[0]; worst={}
def note(kind,e,lim,what):
    worst[kind]=max(worst.get(kind,0),e)
    if not e<=lim:
        bad[0]+=1
        if bad[0]<16: print("FAIL",kind,what,e,flush=True)
# a term on the region (row,O,col,C) of the weight, its fp64 value added into V
def make(kind,V,rank,fdt,coef=.7,region=None):
    O,C=V.shape
    row,h,col,w=region or (0,O,0,C)
    P=V[row:row+h,col:col+w]
    if kind in("lora","loha"):
        n=1 if kind=="lora" else 2; args={}; prod=1; mags=[]
        for i in range(n):
            dt=fdt if i==0 or fdt==torch.float32 else torch.float32
            u,d=randn((h,rank),.3,dt),randn((rank,w),.3,dt)
            pu,pd=pack([(u,0,FMT(u),row%16,1),(d,1,FMT(d),col%32,1)])
            s="2" if i else ""
            args.update({"a"+s:pu[0].data_ptr(),"b"+s:pd[0].data_ptr(),"fmt"+s:pu[1],"ranks"+s:pu[3]}); prod=prod*(u.double()@d.double()); mags.append(u.double().abs()@d.double().abs())
        P+=coef*prod; MAG[0][row:row+h,col:col+w]+=coef*torch.stack([p.abs() for p in mags]).prod(0)
        return term(np.float32(coef),n-1,h,w,row,col,**args)
    coef=float(np.float32(coef))
    if kind=="kron":
        a,b=rank
        w1,w2=randn((a,b),.3,fdt),randn((h//a,w//b),.3,fdt); keep.extend([w1,w2])
        P+=coef*torch.kron(w1.double(),w2.double()); MAG[0][row:row+h,col:col+w]+=coef*torch.kron(w1.double(),w2.double()).abs()
        return term(coef,2,h,w,row,col,a=w1.data_ptr(),b=w2.data_ptr(),fmt=DT[fdt],fmt2=DT[fdt],inner=(h//a,w//b,b),plain=int(region is None))
    m=randn((h,w),.1,fdt); keep.append(m); P+=coef*m.double(); MAG[0][row:row+h,col:col+w]+=coef*m.double().abs()
    return term(coef,3,h,w,row,col,a=m.data_ptr(),fmt=DT[fdt],plain=int(region is None))
def weight(O,C,dt,layout):
    """base tensor view [O,C], plus (ptr, base_row, columns table or None)"""
    if layout=="plain": w=randn((O,C),.1,torch.float32).to(dt); return w,(w.data_ptr(),C,0)
    if layout=="odd":
        f=randn((O*(C+3)+1,),.1,torch.float32).to(dt); w=f[1:].view(O,C+3)[:,:C]; keep.append(f); return w,(w.data_ptr(),C+3,0)
    perm=torch.randperm(C+5,device=dev)[:C]
    f=randn((O,C+5),.1,torch.float32).to(dt)
    w=f.float()[:,perm].to(dt); keep.append(f)
    return w,(f.data_ptr(),C+5,up(perm.cpu().numpy().astype(np.uint32)))
def squares_case(O,C,dt,layout,axis,taps,terms,zero=True):
    w,(ptr,br,bc)=weight(O,C,dt,layout); keep.append(w)
    scale=.37 if DT[dt]>2 else 1.0
    if layout=="plain" and zero and not terms:
        w.view(torch.uint8)[min(3,O-1)]=0
        if axis==1: w.view(torch.uint8).view(O,-1)[:,:taps*SZ[DT[dt]]]=0
    Vd=w.double()*float(np.float32(scale)); MAG[0]=Vd.abs().clone(); tl=[make(*t[:1],Vd,*t[1:]) for t in terms]
    tl.sort(key=lambda t:t[6]>1)
    other=-(-C//64) if axis==0 else -(-O//64); line=O if axis==0 else C
    part=torch.full((other*line+64,),float('nan'),device=dev); keep.append(part)
    T=np.zeros(1,TARGET); T[0]=(ptr,part.data_ptr(),bc,0,br,0,O,C,0,len(tl),scale,0,0,DT[dt],axis,sum(t[6]<2 for t in tl))
    st=strips([(O,C)]); fn="squares_any" if layout!="plain" or C%8 or (C*SZ[DT[dt]])%(8 if SZ[DT[dt]]==1 else 16) or any(t[6]>=2 and not t[19] for t in tl) else "squares_"+NAME[DT[dt]]
    args=(np.uint64(up(T)),np.uint64(up(np.array(tl,TERM)) if tl else 0),np.uint64(up(st)))
    sq.get_function(fn)((len(st),1,1),(128,1,1),args)
    n=line//taps; mag=torch.rand(n,device=dev)+.5; gain=torch.full((n*taps+8,),float('nan'),device=dev); less=gain.clone()
    N=np.zeros(1,NORM); N[0]=(part.data_ptr(),mag.data_ptr(),gain.data_ptr(),less.data_ptr(),n,other,line,taps)
    GAINS((3,1,1),(256,1,1),(np.uint64(up(N)),))
    if fn!="squares_any" and not any(t[6]<2 for t in tl):
        p0=part.clone(); part.fill_(float('nan')); sq.get_function(fn+"_plain")((len(st),1,1),(128,1,1),args)
        if not torch.equal(p0[:other*line],part[:other*line]): note("plain differs",1,0,(fn,O,C))
        else: worst["plain equal"]=worst.get("plain equal",0)+1
    p1=part.clone(); sq.get_function(fn)((len(st),1,1),(128,1,1),args)
    assert torch.equal(part[:other*line],p1[:other*line]),("not the same bits",fn)
    assert part[other*line:].isnan().all() and gain[n*taps:].isnan().all() and less[n*taps:].isnan().all()
    s=Vd.square().sum(1) if axis==0 else Vd.square().sum(0).view(n,taps).sum(1)
    f=torch.where(s>0,mag.double()/s.sqrt(),0.).nan_to_num(0).repeat_interleave(taps)
    what=(fn,O,C,dt,layout,axis,taps,[t[0] for t in terms],[t[1] for t in terms])
    mg=MAG[0].square().sum(1) if axis==0 else MAG[0].square().sum(0).view(n,taps).sum(1)
    cond=(mg/s.clamp_min(1e-300)).sqrt().repeat_interleave(taps).clamp_min(1) if Vd.numel()//n<16 else 1.0
    e=((gain[:n*taps].double()-f).abs()/f.clamp_min(1e-30)/cond).where(f>0,gain[:n*taps].double().abs()).max().item()
    note("gain",e,3e-7,what)
    note("less",((less[:n*taps].double()-(f-1)).abs()/(f.abs()*cond+1)).max().item(),3e-7,what)
    if (f==0).any(): worst["zero lines"]=worst.get("zero lines",0)+int((f==0).sum())
def right_table(jobs):
    out=[]
    for i,j in enumerate(jobs):
        blocks=-(-(int(j["rows"])+int(j["shift"]))//16); per=8 if j["plain"] else 4 if j["taps"]==1 else 1
        n=-(-blocks//per)*(-(-int(j["ranks"])//2)); q=np.zeros((n,2),np.uint32); q[:,0]=i; q[:,1]=np.arange(n); out.append(q)
    return np.concatenate(out)
def right_jobs(specs):
    """(w ptr, br, bc, O, I, taps, dt, a1 [I,r], fmt, shift, plain, scale)"""
    J=np.zeros(len(specs),RJ); outs=[]
    pks=pack([(a1.t(),4,fmt,0,1) for *_,a1,fmt,_,_,_ in specs])
    for i,((ptr,br,bc,O,I,taps,dt,a1,fmt,shift,plain,scale),p) in enumerate(zip(specs,pks)):
        ranks=-(-a1.shape[1]//16); blocks=-(-(O+shift)//16); n=blocks*taps*ranks*3*512
        o=torch.full((n+256,),255,dtype=torch.uint8,device=dev); outs.append((o,n)); keep.append(o)
        J[i]=(ptr,bc,p[0].data_ptr(),o.data_ptr(),br,O,I,taps,ranks,DT[dt],fmt,shift,plain,scale,0)
    tb=right_table(J); return (up(J),up(tb),len(tb)),outs
def run_right(t): RIGHT((t[2],1,1),(128,1,1),(np.uint64(t[0]),np.uint64(t[1])))
def unpack_up(o,n,O,shift,ranks):
    f=o[:n].view(torch.bfloat16).view(-1,ranks,3,32,4,2).double().sum(2)  # block,rank,lane,word,two
    f=f.view(-1,ranks,8,4,2,2,2)  # g,t,(k half),(row half),e
    return f.permute(0,5,2,1,4,3,6).reshape(-1,ranks*16)  # block,rowhalf,g | rank,khalf,t,e
def right_case(O,I,taps,dt,layout,r,adt,fmt,shift):
    C=I*taps; w,(ptr,br,bc)=weight(O,C,dt,layout); keep.append(w); scale=.37 if DT[dt]>2 else 1.0
    a1=randn((I,r),.3,adt); keep.append(a1)
    sz=SZ[DT[dt]]; plain=int(layout=="plain" and taps==1 and C%8==0 and (C*sz)%(8 if sz==1 else 16)==0)
    t,outs=right_jobs([(ptr,br,bc,O,I,taps,dt,a1,fmt,shift,plain,scale)]); run_right(t)
    o,n=outs[0]; R=-(-r//16)*16; ranks=taps*R//16; what=(O,I,taps,dt,layout,r,adt,fmt,shift,"plain" if plain else "any")
    if not (o[n:]==255).all(): note("overrun",1,0,what)
    got=unpack_up(o,n,O,shift,ranks)
    wd=w.double().view(O,I,taps)*float(np.float32(scale)); want=torch.zeros(O,taps,R,dtype=torch.float64,device=dev); want[:,:,:r]=torch.einsum("oit,ik->otk",wd,a1.double())
    big=torch.zeros_like(want); big[:,:,:r]=torch.einsum("oit,ik->otk",wd.square(),a1.double().square()).sqrt()
    full=torch.zeros(got.shape,dtype=torch.float64,device=dev); full[shift:shift+O]=want.view(O,-1); bg=torch.full_like(full,1e-300); bg[shift:shift+O]=big.view(O,-1).clamp_min(1e-300)
    e=((got-full).abs()/bg); e=torch.where(full==0,got.abs(),e)
    note(f"right I~{10**len(str(I))//10} max",e.max().item(),(2e-6 if I<600 else 1e-5),what)
    f32=torch.einsum("oit,ik->otk",(w.float()*scale).view(O,I,taps),a1.float()).double()
    worst["torch fp32 max"]=max(worst.get("torch fp32 max",0),((f32-want[:,:,:r]).abs()/big[:,:,:r].clamp_min(1e-300)).max().item())
    tf=got[shift:shift+O].float(); ref=pack([(tf,0,2,shift,1)])[0]
    if not torch.equal(ref[0],o[:n]): note("layout",1,0,what)
def down_case(r,I,taps,dt,fmt,shift):
    a2=randn((r,I),.3,dt); R=-(-r//16)*16
    M=torch.zeros(taps,R,I,taps,device=dev)
    for t in range(taps): M[t,:r,:,t]=a2.float()
    x,y=pack([(a2,1,fmt,shift,taps),(M.view(taps*R,I*taps).to(dt),1,fmt,shift,1)])
    if x[2:]!=y[2:] or not torch.equal(x[0],y[0]): note("down",1,0,(r,I,taps,dt,fmt,shift))
    else: worst["down equal"]=worst.get("down equal",0)+1
F32,F16,BF=torch.float32,torch.float16,torch.bfloat16; E4,E5=torch.float8_e4m3fn,torch.float8_e5m2
def tests(small):
    for dt in (F32,F16,BF,E4,E5):
        for axis in (0,1):
            for O,C in ((100,200),) if small else ((64,64),(100,200),(1,8),(333,1040),(17,3008)):
                squares_case(O,C,dt,"plain",axis,1,[])
                squares_case(O,C,dt,"plain",axis,1,[("lora",33,BF),("dense",0,F32)])
                if small: continue
                squares_case(O,C,dt,"plain",axis,1,[("lora",7,F16),("loha",16,BF)])
                squares_case(O,C,dt,"plain",axis,1,[("lora",64,F32),("loha",4,F32),("loha",5,F16)])
                squares_case(O,C,dt,"plain",axis,1,[("dense",0,BF),("dense",0,F16)])
                for fdt in (F32,F16,BF):
                    if C%16==0: squares_case(O,C,dt,"plain",axis,1,[("kron",(1,2),fdt)])
            for layout in ("odd","perm") if not small else ("perm",):
                for O,I,taps in ((5,7,9),(77,13,9),(65,131,1),(1,1,1)):
                    squares_case(O,I*taps,dt,layout,axis,taps if axis else 1,[])
                    if small: break
                    squares_case(O,I*taps,dt,layout,axis,taps if axis else 1,[("lora",4,BF),("lora",1,F32),("dense",0,F16)])
            squares_case(90,150,dt,"plain",axis,3 if axis else 1,[("lora",16,BF,.7,(21,50,35,70)),("loha",5,F32,.7,(3,80,100,41)),("dense",0,BF,.5,(7,3,2,99)),("kron",(2,5),F32,.5,(10,30,5,50))])
    # aligned weight, products on regions
            squares_case(96,160,dt,"plain",axis,1,[("lora",16,BF,.7,(21,50,35,70)),("loha",5,F32,.7,(3,80,100,41))])
    for axis in (0,1):
        squares_case(40,72*9,BF,"plain",axis,9 if axis else 1,[("lora",32,BF)])
        if not small: squares_case(2560,1280,BF,"plain",axis,1,[("lora",32,BF)]); squares_case(1280,5120,BF,"plain",axis,1,[("lora",32,F32)])
    for i,dt in enumerate((F32,F16,BF,E4,E5)):
        for r,adt,fmt in ((1,BF,0),(33,F32,2)) if small else ((1,BF,0),(4,F16,2),(7,F32,2),(16,BF,0),(33,F32,2),(64,BF,0),(64,F32,2),(100,BF,2)):
            for O,I,taps,layout,shift in ((65,40,1,"plain",5),(33,45,9,"perm",3)) if small else ((128,64,1,"plain",0),(200,328,1,"plain",5),(1,8,1,"plain",15),(77,1000,1,"plain",1),(65,131,1,"odd",0),(130,45,1,"perm",9),(33,45,9,"plain",3),(20,70,9,"odd",0),(19,33,4,"perm",7),(18,16,25,"plain",0),(5,3,2,"plain",15)):
                right_case(O,I,taps,dt,layout,r,adt,fmt,shift)
        if not small: right_case(256,5120,1,dt,"plain",32,F32,2,0); right_case(256,5120,1,dt,"plain",32,BF,0,0); right_case(48,1280,9,dt,"plain",32,BF,0,0)
        keep.clear()
    for r,I,taps in ((1,5,9),(16,64,1),(33,40,9),(7,13,4),(64,100,25)):
        for dt,fmt in ((F32,2),(BF,0),(F16,1),(BF,2)):
            for shift in (0,19): down_case(r,I,taps,dt,fmt,shift)
    torch.cuda.synchronize()
    print("cases failed:",bad[0],{k:(f"{v:.2e}" if isinstance(v,float) else v) for k,v in worst.items()},f"{time.time()-t00:.1f}s",flush=True); keep.clear()
def perf():
    att=attention_set("sdxl"); base=[randn(s,.02,BF) for _,s in att]; dims=[(b.shape[0],b.numel()//b.shape[0]) for b in base]
    n=sum(b.numel() for b in base); dst=[torch.empty_like(b) for b in base]
    flat=torch.empty(n//1024*1024,device=dev,dtype=BF); d2=torch.empty_like(flat)
    copy=med(lambda:d2.copy_(flat)); print(torch.cuda.get_device_name(),"copy ms",round(copy,3)); del flat,d2,dst
    st=strips(dims)
    def sq_set(name,tl,axis,fn="squares_bf16",W=base,idx=(0,5,300)):
        lines=[(O,-(-C//64)) if axis==0 else (C,-(-O//64)) for O,C in dims]; off=np.cumsum([0]+[a*b for a,b in lines]); part=torch.empty(int(off[-1]),device=dev)
        goff=np.cumsum([0]+[a for a,_ in lines]); gain=torch.empty(int(goff[-1]),device=dev); less=torch.empty_like(gain); mag=torch.ones_like(gain)
        T=np.zeros(len(W),TARGET); N=np.zeros(len(W),NORM)
        for i,(w,(O,C)) in enumerate(zip(W,dims)):
            T[i]=(w.data_ptr(),part.data_ptr()+4*int(off[i]),0,0,C,0,O,C,i*len(tl[0]),len(tl[0]),1.0,0,0,DT[w.dtype],axis,sum(t[6]<2 for t in tl[i]))
            N[i]=(part.data_ptr()+4*int(off[i]),mag.data_ptr(),gain.data_ptr()+4*int(goff[i]),less.data_ptr()+4*int(goff[i]),lines[i][0],lines[i][1],lines[i][0],1)
        flat=[t for l in tl for t in l]
        args=(np.uint64(up(T)),np.uint64(up(np.array(flat,TERM)) if flat else 0),np.uint64(up(st))); f=sq.get_function(fn); na=np.uint64(up(N))
        t=med(lambda:f((len(st),1,1),(128,1,1),args)); g=med(lambda:GAINS((64,len(W),1),(256,1,1),(na,)))
        print(f"{name:28s} {fn:14s} axis {axis} {t:7.3f} ms {t/copy:5.2f}x  gains {g:.3f}",flush=True)
    sq_set("no terms",[[]]*len(base),0); sq_set("no terms",[[]]*len(base),0,"squares_bf16_plain"); sq_set("no terms",[[]]*len(base),1,"squares_bf16_plain")
    for r,fdt in ((32,BF),(32,F16),(32,F32),(128,BF)):
        lo=[(randn((O,r),.1,fdt),randn((r,C),.1,fdt)) for O,C in dims]
        p=pack([(m,l,FMT(m),0,1) for u,d in lo for m,l in ((u,0),(d,1))])
        tl=[[term(.5,0,*dims[i],a=p[2*i][0].data_ptr(),b=p[2*i+1][0].data_ptr(),fmt=p[2*i][1],ranks=p[2*i][3])] for i in range(len(base))]
        for axis in (0,1) if fdt==BF else (0,): sq_set(f"lora r{r} {fdt}",tl,axis)
        if r==32 and fdt==BF:
            sq_set("same","" or tl,0,"squares_any")
            sq_set("loha r32",[[t[0][:2]+t[0][:2]+t[0][4:6]+(1,)+t[0][7:9]+(t[0][9],t[0][9])+t[0][11:]] for t in tl],0)
        keep.clear()
    kr=[(randn((8,8),.2,BF),randn((O//8,C//8),.2,BF)) for O,C in dims]
    sq_set("lokr",[[term(.5,2,*dims[i],a=kr[i][0].data_ptr(),b=kr[i][1].data_ptr(),fmt=2,fmt2=2,inner=(dims[i][0]//8,dims[i][1]//8,8),plain=1)] for i in range(len(base))],0,"squares_bf16_plain")
    def rset(name,W,r,adt,fmt,taps=1,plain=1,O_=None):
        sp=[(w.data_ptr(),w.numel()//w.shape[0],0,w.shape[0],w.numel()//w.shape[0]//taps,taps,w.dtype,randn((w.numel()//w.shape[0]//taps,r),.1,adt),fmt,0,plain,1.0) for w in W]
        t,_=right_jobs(sp); b=sum(w.numel()*w.element_size() for w in W); m=med(lambda:run_right(t)); print(f"right {name:26s} r{r} fmt {fmt} {m:7.3f} ms  {m/(copy*b/(n*2)):5.2f}x copy of its bytes",flush=True); keep.clear()
    rset("bf16",base,32,BF,0); rset("bf16",base,16,BF,0); rset("bf16",base,64,BF,0); rset("bf16 W, a1 fp32",base,32,F32,2); rset("bf16 not plain",base,32,BF,0,plain=0)
    rset("f16",[b.to(F16) for b in base],32,F16,2); 
    e=[b.to(E4) for b in base]; rset("e4m3",e,32,BF,0); del e
    e=[b.float() for b in base[:360]]; rset("f32",e,32,F32,2); del e
    conv=[randn((1280,1280*9),.02,BF) for _ in range(20)]+[randn((640,640*9),.02,BF) for _ in range(20)]
    rset("conv bf16 taps 9",conv,32,BF,0,taps=9,plain=0); rset("conv bf16 taps 9, a1 fp32",conv,32,F32,2,taps=9,plain=0)
    print(f"{time.time()-t00:.1f}s")
if sys.argv[1]=="san": tests(True)
else:
    if "t" in sys.argv[1]: tests(False)
    if "p" in sys.argv[1]: perf()
