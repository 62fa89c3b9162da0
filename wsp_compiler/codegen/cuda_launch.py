class CudaLayer: pass
