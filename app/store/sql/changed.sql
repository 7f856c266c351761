-- Raise the number by which processes know that their copy of a topic is old. Its row's lock makes changes of one topic
-- commit in the order of their numbers.
INSERT INTO {schema}.changes AS c (topic, number)
VALUES ($1::text, 1)
ON CONFLICT (topic) DO UPDATE SET number = c.number + 1
