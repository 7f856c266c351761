-- Forget the counts of queues that have no job of any state left, so that names which come and go leave nothing.
DELETE FROM {schema}.counts AS c
 WHERE (c.scheduled, c.ready, c.held, c.active, c.retry, c.completed, c.failed, c.cancelled, c.expired)
       = (0, 0, 0, 0, 0, 0, 0, 0, 0)
