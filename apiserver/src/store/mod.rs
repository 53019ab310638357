//! Where objects are kept: every write is durable before it is answered, and watchers learn of it in order.
