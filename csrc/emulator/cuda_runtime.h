// Stands in for CUDA's header of this name where kernels are compiled for the host.
#pragma once
#include "emulator/cuda_on_cpu.h"
