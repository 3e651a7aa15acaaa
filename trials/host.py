import sys,time,torch,json
sys.path[:0]=["plugin","tests/bench"]
import lycore
from shapes import attention_set
from safetensors.torch import save_file
dev="cuda"; w={n:(torch.randn(s,device=dev)*.02).bfloat16() for n,s in attention_set("sdxl")}
t={}
for n,x in w.items():
    k="lora_unet_"+n.replace(".","_"); O=x.shape[0]; C=x.numel()//O
    t[k+".lora_up.weight"]=torch.randn(O,32).half(); t[k+".lora_down.weight"]=torch.randn(32,C).half(); t[k+".alpha"]=torch.tensor(16.)
save_file(t,"/dev/shm/a.safetensors")
def T(f,n=5):
    r=[]
    for _ in range(n):
        torch.cuda.synchronize(); a=time.perf_counter(); f(); b=time.perf_counter(); torch.cuda.synchronize(); c=time.perf_counter(); r.append(((b-a)*1e3,(c-a)*1e3))
    return ["%.2f/%.2f"%x for x in r]
for k in (1,5):
    st=lycore.Stack(w); hs=None
    t0=time.perf_counter(); hs=[st.add("/dev/shm/a.safetensors",.1) for _ in range(k)]; print("add",(time.perf_counter()-t0)*1e3)
    print("first",T(lambda:st.apply(),1))
    i=[0]
    def change():
        i[0]+=1
        for h in hs: h.strength=.1+.1*(i[0]%2)
        st.apply()
    print("change host/total ms",T(change)); print("noop",T(lambda:st.apply()))
    print(st.info())
    print("restore",T(lambda:st.restore(),1)); print("first again",T(lambda:st.apply(),1)); st.close()
