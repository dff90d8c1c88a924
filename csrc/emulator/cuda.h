// Stands in for CUDA's header of this name, and for what hopper_ptx.h makes of it, where kernels are compiled for the
// host.
#pragma once
#include "emulator/driver.h"
#include "emulator/hopper_on_cpu.h"
