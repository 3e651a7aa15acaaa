// y = a * x + y. One thread per element; reads 8 bytes and writes 4 bytes each.
//
// The library's own check that this driver loads and runs what is embedded (src/cuda/tests.rs).

struct Axpy {
    const float *x;
    float *y;
    unsigned n;
};

extern "C" __global__ void axpy(Axpy p, float a)
{
    const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < p.n)
        p.y[i] += a * p.x[i];
}

// Reverses each block's share of y through dynamic shared memory, of which the block has `words` words.
extern "C" __global__ void reverse(float *y, unsigned words)
{
    extern __shared__ float share[];
    float *mine = y + (unsigned long long)blockIdx.x * words;
    for (unsigned i = threadIdx.x; i < words; i += blockDim.x)
        share[i] = mine[i];
    __syncthreads();
    for (unsigned i = threadIdx.x; i < words; i += blockDim.x)
        mine[i] = share[words - 1 - i];
}
