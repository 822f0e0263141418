// Telling a forked child from the process that made an object.
#pragma once

namespace tiered_mem {

/// Differs between a process and its forked children. Costs no system call.
unsigned process_generation();

}  // namespace tiered_mem
