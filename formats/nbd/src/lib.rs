// SPDX-License-Identifier: Apache-2.0 OR MIT
//! The network block device protocol: server.
