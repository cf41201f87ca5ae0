// SPDX-License-Identifier: Apache-2.0 OR MIT
//! Builds and caches the appliance: kernel, modules, tools.
