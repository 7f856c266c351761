-- Lock a schedule: whoever changes it, or notes a run of it, holds its row.
SELECT {schedule} FROM {schema}.schedules AS s WHERE s.name = $1::text FOR UPDATE
