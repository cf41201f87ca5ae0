// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The program inside the appliance: PID 1, mounts, files, commands.
