"""General chat requests of our own making: many kinds of request, each from templates and lists,
with random numbers.

`chat_requests` yields them without end; `make_prompts.py` mixes them with requests about code.
"""

# ruff: noqa: E501 - lists of texts
from __future__ import annotations

import email
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path


def _list(text: str) -> list[str]:
    return [" ".join(item.split()) for item in text.split(",")]


TOPICS = {
    "programming": _list("""recursion, a hash table, a linked list, a binary search tree, a stack, a queue, a heap, dynamic
        programming, a greedy algorithm, breadth-first search, depth-first search, quicksort, merge sort, big O notation, a closure,
        a decorator in Python, a generator in Python, a context manager, list comprehensions, lambda functions, type hints,
        object-oriented programming, inheritance, polymorphism, encapsulation, dependency injection, the observer pattern, the
        factory pattern, functional programming, immutability, garbage collection, a pointer, a memory leak, a race condition,
        a deadlock, a mutex, a thread, a coroutine, async and await, an event loop, a compiler, an interpreter, a virtual machine,
        unit testing, test-driven development, code review, refactoring, technical debt, semantic versioning, a regular expression,
        JSON, YAML, XML, CSV files, UTF-8, floating-point numbers, two's complement, bitwise operators, a checksum"""),
    "computing": _list("""an operating system, a kernel, virtual memory, a file system, a process, a container, Docker, Kubernetes,
        a load balancer, a reverse proxy, a web server, HTTP, HTTPS, a REST API, GraphQL, WebSockets, DNS, TCP, UDP, an IP address,
        a firewall, a VPN, public-key cryptography, a digital signature, password hashing, two-factor authentication, OAuth,
        SQL injection, cross-site scripting, phishing, a relational database, a primary key, a foreign key, a database index,
        a transaction, normalization, a NoSQL database, caching, a message queue, microservices, continuous integration, Git,
        a merge conflict, a pull request, the command line, SSH, a cron job, environment variables, a package manager, a browser,
        a cookie, a search engine, cloud computing, serverless functions, a GPU, a CPU cache, an SSD, RAID, a backup strategy"""),
    "machine learning": _list("""linear regression, logistic regression, a decision tree, a random forest, k-means clustering,
        a neural network, backpropagation, gradient descent, overfitting, cross-validation, regularization, a confusion matrix,
        precision and recall, a convolutional network, a recurrent network, attention, a transformer model, word embeddings,
        transfer learning, reinforcement learning, a learning rate, batch normalization, dropout, principal component analysis,
        a support vector machine, the bias-variance trade-off, data augmentation, feature scaling, one-hot encoding, a tokenizer"""),
    "mathematics": _list("""prime numbers, the Pythagorean theorem, a derivative, an integral, a matrix, a vector, complex numbers,
        logarithms, exponential growth, probability, conditional probability, the normal distribution, standard deviation, the median,
        a permutation, a combination, the Fibonacci sequence, a fraction, percentages, ratios, negative numbers, the number pi, zero,
        infinity, a proof by contradiction, mathematical induction, set theory, graph theory, a quadratic equation, a circle,
        compound interest, a prime factorization, modular arithmetic, symmetry, fractals"""),
    "physics": _list("""gravity, friction, momentum, kinetic energy, electricity, magnetism, a rainbow, the speed of light,
        relativity, quantum mechanics, radioactivity, nuclear fusion, sound waves, the Doppler effect, buoyancy, air pressure,
        temperature, entropy, a lens, a laser, a black hole, a vacuum, static electricity, a semiconductor, a transistor,
        a battery, an electric motor, superconductivity, the greenhouse effect, a pendulum"""),
    "space": _list("""the Moon, Mars, Jupiter, Saturn's rings, a comet, an asteroid, a solar eclipse, a lunar eclipse, the Sun,
        a supernova, a neutron star, the Milky Way, the Big Bang, dark matter, a space telescope, a rocket, a satellite,
        the International Space Station, a meteor shower, the seasons, tides, a light-year, an exoplanet, the North Star"""),
    "chemistry": _list("""an atom, a molecule, the periodic table, an acid, a base, pH, a catalyst, oxidation, rust, soap, salt,
        water, carbon dioxide, plastic, glass, steel, photosynthesis, combustion, a crystal, distillation, an isotope, ozone,
        a chemical bond, a solution, baking powder, alcohol, caffeine, sugar, gold, aluminium"""),
    "biology": _list("""a cell, DNA, a gene, evolution, natural selection, a virus, bacteria, a vaccine, antibiotics, the heart,
        the lungs, the brain, the liver, the immune system, blood, bones, muscles, the eye, the ear, sleep, hormones, digestion,
        an ecosystem, a food chain, pollination, migration of birds, hibernation, a coral reef, a rainforest, mushrooms, bees,
        ants, whales, octopuses, penguins, dinosaurs, dogs, cats, trees, seeds, fermentation, yeast"""),
    "earth": _list("""a volcano, an earthquake, a tsunami, plate tectonics, a glacier, a desert, a river delta, a monsoon,
        a hurricane, a tornado, lightning, clouds, fog, snow, the water cycle, the carbon cycle, climate change, soil, erosion,
        groundwater, a cave, a fossil, an island, the Amazon, the Sahara, the Himalayas, the Alps, the Nile, the Pacific Ocean,
        Antarctica, renewable energy, wind power, solar power, hydropower, recycling, composting"""),
    "history": _list("""the Roman Empire, ancient Egypt, ancient Greece, the Silk Road, the Middle Ages, the Black Death,
        the Renaissance, the printing press, the Industrial Revolution, the French Revolution, the American Civil War,
        World War I, World War II, the Cold War, the fall of the Berlin Wall, the Space Race, the Great Depression,
        the Ottoman Empire, the Inca Empire, the Vikings, the Mongol Empire, the Ming dynasty, the Meiji Restoration,
        the suffragettes, the history of writing, the history of money, the history of the bicycle, the history of chess,
        the invention of the telephone, the first computers, the history of the internet, the Library of Alexandria"""),
    "economics": _list("""inflation, supply and demand, a recession, interest rates, a central bank, taxes, a budget, a mortgage,
        the stock market, a bond, an index fund, insurance, unemployment, globalization, free trade, a tariff, a monopoly,
        gross domestic product, a startup, venture capital, a cryptocurrency, a pension, credit scores, a contract, minimum wage,
        marketing, a business plan, a supply chain, accounting, cash flow, opportunity cost, game theory"""),
    "society": _list("""democracy, the separation of powers, a constitution, human rights, freedom of speech, the United Nations,
        the European Union, a referendum, federalism, public transport, urban planning, volunteering, social media, privacy,
        journalism, fake news, education systems, remote work, trade unions, copyright, open-source software, a patent,
        public libraries, census, immigration, gender equality, accessibility, citizen science"""),
    "culture": _list("""haiku, a sonnet, the novel, science fiction, a fairy tale, Greek mythology, Shakespeare, opera, jazz,
        the blues, classical music, hip hop, a symphony, the piano, the guitar, the violin, impressionism, cubism, photography,
        cinema, animation, theatre, ballet, architecture, Gothic cathedrals, origami, calligraphy, pottery, manga, folk tales,
        the Olympic Games, football, tennis, cricket, chess, Go, carnival, tea ceremonies, Diwali, the Lunar New Year"""),
    "food": _list("""bread, sourdough, pasta, rice, cheese, chocolate, coffee, tea, olive oil, honey, tofu, sushi, tacos, curry,
        pancakes, soup, salad dressing, tomato sauce, pickles, yogurt, spices, garlic, potatoes, lentils, ice cream, apple pie,
        a balanced diet, vitamins, protein, fibre, a vegetarian diet, food allergies, meal planning, street food, breakfast"""),
    "everyday life": _list("""time management, procrastination, habits, stress, meditation, exercise, running, yoga, cycling, hiking,
        gardening, houseplants, pets, cleaning, decluttering, a good night's sleep, friendship, conflict, public speaking, job
        interviews, a CV, negotiation, teamwork, leadership, feedback, learning a language, note-taking, reading habits, journaling,
        travelling alone, camping, first aid, saving money, moving house, parenting, birthdays, gifts, screen time"""),
    "language": _list("""grammar, a metaphor, a simile, irony, alliteration, a synonym, an adverb, the passive voice, punctuation,
        the comma, the apostrophe, an idiom, a dialect, sign language, Esperanto, Latin, loanwords, etymology, the alphabet,
        Chinese characters, phonetics, translation, rhetoric, storytelling, an essay, a summary, a paragraph, a thesis statement"""),
    "technology": _list("""a smartphone, a touch screen, GPS, Bluetooth, Wi-Fi, 5G, a QR code, a barcode, a 3D printer, a drone,
        a robot, a self-driving car, an electric car, a heat pump, a refrigerator, a microwave oven, an elevator, a bridge,
        a suspension bridge, a skyscraper, a dam, a train, a ship, a submarine, an aeroplane, a helicopter, a hot-air balloon,
        a camera, a microphone, a loudspeaker, headphones, a printer, LED lights, a clock, a lock, a zipper, a sewing machine"""),
}  # fmt: skip
FIELDS = list(TOPICS)
LEARNERS = _list("""a ten-year-old, a beginner, a student, my grandmother, someone new to the subject, a busy manager, a teenager,
    a curious friend, a class of schoolchildren, a non-native speaker, an engineer, a five-year-old""")
EXPLAIN = (
    "What is {topic}?", "Explain {topic}.", "Explain {topic} to {learner}.", ("How does " "{topic} " "work?"), ("What " "should " "I " "know " "about " "{topic}?"),
    "Tell me about {topic}.", "Give me a short introduction to {topic}.", ("Why is {topic} " "important?"), ("In " "two " "sentences: " "{topic}?"),
    "Describe {topic} in simple words.", "What are common misunderstandings about {topic}?", ("Explain " "{topic} " "with " "an " "example."),
    "Explain {topic} with an analogy.", "What are the main ideas behind {topic}?", ("Can you " "explain " "{topic} " "step " "by " "step?"),
    "I have to explain {topic} to {learner}. How would you do it?", ("What are the advantages " "and " "disadvantages " "of " "{topic}?"),
    "Write a short paragraph about {topic}.", ("Write three quiz questions with answers about " "{topic}."), ("Write " "an " "encyclopedia " "entry " "about " "{topic}."),
    "Give me five interesting facts about {topic}.", ("What would the world look like without " "{topic}?"), ("Where " "did " "{topic} " "come " "from?"),
    "Summarize what is known about {topic} in five bullet points.", ("Write an outline for a " "talk " "about " "{topic}."), ("Define " "{topic} " "precisely."),
    "What questions should I ask an expert on {topic}?", ("I never understood {topic}. Help " "me, " "please."), ("Make " "flash " "cards " "about " "{topic}."),
    "Write a glossary with five terms that have to do with {topic}.", ("Is it worth learning " "about " "{topic}? " "Why?"), ("hey, " "quick " "question " "about " "{topic}: " "what " "is " "it?"),
)  # fmt: skip
COMPARE = (
    "What is the difference between {a} and {b}?", "Compare {a} and {b}.", ("{a} or {b}: which " "matters " "more, " "and " "why?"),
    "Compare {a} with {b} in a table.", "How are {a} and {b} related?", ("What do {a} and {b} " "have " "in " "common?"),
    "Explain the difference between {a} and {b} to {learner}.", ("When would I think of {a} " "rather " "than " "{b}?"),
    "List three similarities and three differences between {a} and {b}.", ("Write a dialogue in " "which " "{a} " "and " "{b} " "are " "compared."),
)  # fmt: skip
TASKS = _list("""bake bread, make pancakes, cook rice, brew good coffee, sharpen a knife, fix a flat bicycle tyre, change a light bulb
    safely, unclog a sink, paint a room, hang a picture, remove a red wine stain, iron a shirt, sew on a button, fold a fitted sheet, tie a
    tie, pack a suitcase, plan a road trip, find cheap flights, pitch a tent, read a map, grow tomatoes, water houseplants, start a compost
    heap, prune roses, train a puppy, introduce two cats, clean an aquarium, learn to swim, run five kilometres, do a push-up, warm up before
    sport, stretch after running, sit well at a desk, fall asleep faster, get up early, stop procrastinating, write a to-do list, take good
    notes, memorize vocabulary, prepare for an exam, give a presentation, write a cover letter, prepare for a job interview, ask for a raise,
    give criticism politely, apologize sincerely, make new friends in a new city, host a dinner party, plan a birthday party, choose a gift,
    save money every month, make a household budget, compare insurance offers, read a contract, file a complaint, rent a flat, move house,
    back up a computer, choose a strong password, recognize a phishing mail, speed up a slow laptop, free up disk space, set up a home Wi-Fi,
    undo the last commit in Git, resolve a merge conflict, create a branch in Git, install a Python package, create a virtual environment,
    read a CSV file in Python, sort a dictionary by value in Python, reverse a string in JavaScript, find duplicates in SQL, join two tables in
    SQL, write a loop in Bash, find large files on Linux, kill a process on Linux, schedule a job with cron, set an environment variable,
    write a Dockerfile, centre a div in CSS, make a web page responsive, debug a segmentation fault, profile a slow Python program, write a
    unit test, read a stack trace, name variables well, document a function, review a pull request, estimate a software task, learn
    programming, build a small web site, call a REST API from Python, parse JSON in JavaScript, use regular expressions, handle exceptions in
    Python, log messages in Python, parse command-line arguments in Python, connect to a database from Python, write a README, take a good
    photograph, draw a face, play a first chord on the guitar, read sheet music, write a short story, write a poem, learn chess openings,
    solve a Rubik's cube, juggle three balls, do a simple card trick, make origami crane, knit a scarf, build a birdhouse""")
HOW = (
    "How do I {task}?", "How can I {task}?", "Give me step-by-step instructions: how to {task}.", ("What " "is " "the " "best " "way " "to " "{task}?"),
    "I want to {task}. Where do I start?", "Write a short guide on how to {task}.", ("What " "mistakes " "should " "I " "avoid " "when " "I " "{task}?"),
    "What do I need to {task}?", "Explain to {learner} how to {task}.", ("Give me five tips on " "how " "to " "{task}."),
    "Make a checklist for somebody who wants to {task}.", "how to {task}", ("I tried to {task} " "and " "failed. " "What " "could " "have " "gone " "wrong?"),
)  # fmt: skip
HEROES = _list("""a lighthouse keeper, a young inventor, an old fisherman, a robot gardener, a shy dragon, a lost tourist, a baker, a clever
    fox, two sisters, a night watchman, a retired detective, a time traveller, a street musician, a librarian, a mapmaker, an astronaut, a
    talking cat, a forgetful wizard, a postman, a beekeeper, a chess player, a small cloud, a broken clock, a taxi driver, a programmer, a
    snail, a queen without a country, a boy who collects sounds, a girl who can't lie, a ghost who is afraid of people""")
PLACES = _list("""on a small island, in a snowed-in village, in a city under the sea, at a railway station, in an old library, on Mars, in a
    desert town, on a night train, in a forest that never sleeps, at a school for inventors, in a museum after closing time, on a cargo ship,
    in a valley of windmills, in a bakery at four in the morning, on the last day of summer, during a power cut, in a hotel with too many
    doors, in the mountains, at a flea market, in a future without paper""")
EVENTS = _list("""finds a letter that was never sent, learns to trust a stranger, loses something important, must choose between two friends,
    hears a strange song, gets a second chance, discovers a hidden door, breaks a promise, saves a village, makes a terrible mistake, meets an
    old enemy, builds something impossible, waits for somebody, wins a strange prize, tells the truth at last, keeps a secret, gets lost,
    repairs an old machine, receives an unexpected visitor, learns what courage means""")
FORMS = _list("""short story, story of about 100 words, fairy tale, story with a surprising end, bedtime story, dialogue, diary entry, opening
    paragraph of a novel, fable with a moral, humorous story, mystery story, letter, scene for a play, story in the first person""")
POEMS = _list("""short poem, haiku, limerick, poem of four lines, sonnet, rhyming poem, free-verse poem, song text with a chorus, acrostic,
    nursery rhyme, two-line verse for a card""")
SUBJECTS = _list("""autumn, the sea at night, a cup of coffee, Monday mornings, a bug in a program, an old friend, rain on a window, a train
    journey, the first snow, a lost key, grandparents, a garden in spring, the moon, a sleeping cat, homework, silence, a busy market, courage,
    time, music, a long walk, mountains, the colour blue, a city at dawn, bread, fireflies, saying goodbye, a new beginning, wind, a lighthouse""")
SENDERS = _list("""a customer, a student, a tenant, a team leader, a job applicant, a parent, a teacher, a freelancer, a club secretary, a
    neighbour, an intern, a project manager, a landlord, a software developer, an event organizer, a traveller""")
READERS = _list("""the support team, a professor, the landlord, the whole team, the personnel department, the school, a client, a colleague,
    all members, the manager, a hotel, an airline, the city council, a supplier, a friend, the bank""")
PURPOSES = _list("""to complain about a late delivery, to ask for an extension of a deadline, to report a broken heating, to announce a meeting,
    to apply for a job, to thank somebody for help, to apologize for a mistake, to ask for a refund, to cancel an appointment, to invite to a
    party, to ask for feedback on a draft, to remind of an unpaid invoice, to ask for a day off, to introduce a new colleague, to decline an
    offer politely, to follow up after an interview, to report a bug, to propose a new idea, to ask about opening hours, to confirm a booking,
    to change a reservation, to say goodbye on the last day of work, to ask for a recommendation letter, to congratulate on a promotion""")
MANNERS = _list(
    """a polite, a short, a friendly, a formal, a firm but polite, an informal, a professional, a warm, a three-sentence, a clear"""
)
LISTS = _list("""things to do on a rainy day, healthy snacks, names for a cat, names for a small bakery, icebreaker questions, books for a long
    journey, ideas for a birthday present under 20 dollars, vegetarian dinners, ways to save energy at home, exercises without equipment, topics
    for small talk, ideas for a science project, games for a car trip, words that rhyme with light, synonyms of good, ideas for a first date,
    ideas for a blog about cooking, questions for a job interview, tips for a new manager, side projects for a programmer, slogans for a bicycle
    shop, names for a football team, good habits for students, things to pack for a weekend, reasons to learn a language, countries in Africa,
    programming languages and what they are good for, Python libraries for data analysis, HTTP status codes and their meanings, Linux commands
    that every beginner should know, git commands for everyday work, keyboard shortcuts, design patterns, sorting algorithms, data structures,
    SQL keywords, open-source licences, mammals that live in the sea, musical instruments, inventions that changed the world, famous bridges,
    ways to say thank you, excuses for being late, ideas for a school play, plants for a dark room, cheap meals for students, team-building
    activities, ways to relax after work, conversation starters for a family dinner, goals for a new year""")
SITUATIONS = _list("""I argue with my flatmate about the dishes, I can't concentrate at work, I am nervous about a presentation tomorrow, I want to
    change my career at forty, my neighbour is very loud at night, I forgot a friend's birthday, I want to learn programming but have little
    time, I feel tired every afternoon, my team misses every deadline, I am new in a city and know nobody, my child doesn't want to do homework,
    I got two job offers, I spend too much time on my phone, I can't decide what to study, my boss never gives feedback, I want to eat less
    sugar, I keep forgetting names, I am afraid of flying, my code works but nobody understands it, I inherited a large code base without tests,
    a colleague takes credit for my work, I want to start running, my laptop is slow and I can't afford a new one, my plants keep dying, I can't
    sleep before exams, I want to write a book but never begin, our meetings take too long, I disagree with a code review, my savings are small,
    I have to give bad news to a client, I want to read more, I am bored on Sundays, I made a mistake at work that nobody noticed, my friend
    never pays me back, I am always late, I want to travel alone for the first time, my parents don't understand computers, I want a pet but
    live in a small flat, I was promoted and now lead my former colleagues, I find it hard to say no""")
ADVICE = (
    "{s}. What should I do?", "{s}. Any advice?", "Please help me: {t}. What would you suggest?", ("{s}. " "Give " "me " "three " "practical " "tips."),
    "{s}. Is that normal, and what can I do about it?", ("What would you say to a friend who " "tells " "you: " "\"{s}.\"?"), ("{s}. " "Make " "a " "plan " "for " "the " "next " "week."),
)  # fmt: skip
NAMES = _list("""Anna, Ben, Carla, David, Elif, Farid, Grace, Hugo, Ines, Jamal, Kim, Lena, Marco, Nora, Omar, Priya, Quentin, Rosa, Sam, Tara,
    Uma, Victor, Wen, Yusuf, Zoe, Aiko, Bruno, Chloe, Diego, Emma""")
GOODS = _list("""apples, pencils, stickers, books, marbles, oranges, cookies, tickets, notebooks, balloons, eggs, flowers, cards, coins, stamps,
    bottles, shells, muffins, photos, buttons""")
ANSWERS = (
    "",
    "",
    "",
    "",
    " Explain your steps.",
    " Show the calculation.",
    " Think step by step.",
    " Answer with the number only.",
)


def _math(rng: random.Random) -> str:
    """A school problem whose numbers come out whole where they should."""
    a = rng.randint(12, 95)
    b = rng.randint(3, 40)
    c = rng.randint(2, 12)
    small = rng.randint(2, 9)
    one, two = rng.sample(NAMES, 2)
    thing, other = rng.sample(GOODS, 2)
    price = rng.randint(2, 25)
    percent = rng.choice([5, 10, 15, 20, 25, 30, 40])
    speed = rng.choice(range(40, 125, 5))
    hours = rng.randint(2, 8)
    wide, long = sorted(rng.sample(range(3, 40), 2))
    stories = (
        (f"{one} has {a} {thing} and buys {b} more. Then {one} gives {c} of them to {two}. " "How " "many " f"{thing} " "are " "left?"),
        (f"{one} buys {c} {thing} for {price} dollars each and {small} {other} for " f"{price + 3} dollars " "each. " "How " "much " "does " f"{one} " "pay?"),
        f"A box holds {c} {thing}. How many boxes does {one} need for {c * b} {thing}?",
        f"{one} shares {small * b} {thing} equally among {small} friends. How many does each get?",
        (f"{one} and {two} have {2 * a + b} {thing} together. {one} has {b} more than " f"{two}. " "How " "many " "does " "each " "have?"),
        f"A train travels at {speed} km/h for {hours} hours. How far does it go?",
        f"{one} drives {speed * hours} km in {hours} hours. What is the average speed?",
        f"A rectangle is {long} cm long and {wide} cm wide. Find its area and its perimeter.",
        (f"A jacket costs {price * 20} dollars. In a sale it is {percent}% cheaper. What " "does " "it " "cost " "now?"),
        (f"{one} earns {price} dollars an hour and works {b} hours a week. How much does " f"{one} " "earn " "in " f"{c} " "weeks?"),
        (f"{one} is {a} years old. {two} is {b} years younger. How old will they be " "together " "in " f"{c} " "years?"),
        (f"A recipe for {small} people needs {small * 50} g of flour. How much flour is " "needed " "for " f"{small + c} " "people?"),
        f"Solve for x: {c}x + {b} = {c * small + b}.",
        f"Solve the equation {c}(x - {small}) = {c * b}.",
        f"What is {percent}% of {price * 40}?",
        f"Calculate {a} * {b} - {c * small}.",
        f"What is ({a} + {b}) * {small}?",
        (f"A tank holds {a * 10} litres. {b} litres flow out every hour. How much is left " "after " f"{min(hours, 5)} " "hours?"),
        f"The mean of {a}, {b} and a third number is {a + small}. What is the third number?",
        f"Find the greatest common divisor of {c * a} and {c * b}.",
        f"What is the least common multiple of {c} and {small + 3}?",
        f"{one} reads {b} pages a day. How many days does a book of {b * c + small} pages take?",
        f"In a class of {a // 4 * 4} children a quarter wear glasses. How many don't?",
        (f"A bag holds {b} red and {c} blue {thing}. One is drawn at random. What is the " "probability " "that " "it " "is " "blue?"),
        (f"{one} saves {price} dollars every week and already has {a}. After how many weeks " "has " f"{one} " f"{a + price * c} " "dollars?"),
        (f"A shop sold {a} {thing} on Monday, twice as many on Tuesday and {b} fewer than " "on Monday " "on " "Wednesday. " "How " "many " "altogether?"),
        f"Two numbers add up to {a + b}. Their difference is {abs(a - b)}. Which numbers are they?",
        (f"A film begins at {hours + 10}:{rng.choice(['05', '15', '20', '40', '50'])} and " "lasts " f"{a + 45} " "minutes. " "When " "does " "it " "end?"),
        f"Convert {speed} km/h to metres per second.",
        (f"{one} invests {price * 100} dollars at {small}% simple interest a year. How much " "interest " "is " "that " "after " f"{hours} " "years?"),
        (f"{small} workers build a wall in {c * small} hours. How long would {small * 2} " "workers " "take?"),
        f"A square has an area of {c * c} square metres. How long is its side?",
        (f"A right triangle has legs of {3 * small} cm and {4 * small} cm. How long is the " "hypotenuse?"),
        f"{one} runs {small} laps of {speed * 5} m. How many kilometres is that?",
        (f"The price of {thing} rose from {price * 10} to {price * 10 + small * price} " "cents. " "By " "how " "many " "percent?"),
        (f"What are the next three numbers: {c}, {c + small}, {c + 2 * small}, " f"{c + 3 * small}, " "...?"),
        f"Write {a * 7} as a product of prime numbers.",
        f"How many different ways are there to choose 2 of {small + 3} people?",
    )  # fmt: skip
    return rng.choice(stories) + rng.choice(ANSWERS)


LANGUAGES = _list(
    "Spanish, French, German, Italian, Portuguese, Dutch, Polish, Swedish, Turkish, "
    "Chinese, Japanese, Korean, "
    "Russian, Arabic"
)
WHO = _list(
    "my sister, our teacher, the youngest child, my neighbour, a tourist, the whole "
    "family, a good friend, the doctor, our "
    "team, nobody"
)
DID = _list("""would like two tickets to the city centre, forgot the umbrella on the bus, will call back tomorrow morning, bought fresh bread at
    the market, can't find the keys, wanted to see the old castle, moved to a bigger flat last year, worked late every day this week, likes to
    read before going to bed, lost the way in the fog, should drink more water, planted a tree behind the house, arrived an hour too early, was
    very happy about the letter, has never been to the sea, repaired the old radio without help, asked for the way to the station, won the first
    prize""")
ENDS = _list("because it was raining, although nobody had asked, before the shop closed, as " "always, " "but " "it did not " "matter, " "and " "then " "went " "home, "
             "after a long day, with a smile, without saying a word, when the lights went out")  # fmt: skip
TONES = _list("more formal, more friendly, shorter, simpler, more polite, more enthusiastic, in " "the " "past " "tense, as " "a " "question, " "in " "the " "passive "
              "voice, more dramatic, in the style of a news report, for a child")  # fmt: skip


def _sentence(rng: random.Random) -> str:
    who, did, end = (rng.choice(part) for part in (WHO, DID, ENDS))
    return f"{who[0].upper()}{who[1:]} {did}{rng.choice(['', ' ' + end])}."


def _translate(rng: random.Random) -> str:
    sentence = _sentence(rng)
    language = rng.choice(LANGUAGES)
    return rng.choice((
        f"Translate into {language}: {sentence}", (f"How do you say this in {language}? " f"\"{sentence}\""),
        f"Please translate the following sentence into {language}.\n\n{sentence}", (f"{language} " "translation " "of: " f"{sentence}"),
        f"Translate \"{sentence}\" into {language} and explain each word.", ("Translate into " f"{language} " "and " f"{rng.choice(LANGUAGES)}: " f"{sentence}"),
    ))  # fmt: skip


def _rewrite(rng: random.Random) -> str:
    sentence = _sentence(rng)
    tone = rng.choice(TONES)
    words = sentence[:-1].split()
    place = rng.randrange(len(words) - 1)
    swapped = " ".join(
        [*words[:place], words[place + 1], words[place], *words[place + 2 :]]
    ).lower()
    return rng.choice((
        f"Rewrite this sentence so that it is {tone}: {sentence}", f"Make this {tone}:\n{sentence}",
        f"Give me three other ways to say: {sentence}", f"Correct the grammar: {swapped}", ("Correct this " "sentence " "and " "explain " "the " "mistake: " f"{swapped}"),
        f"Continue this story with three sentences: {sentence}", ("Which words in this sentence " "are " "verbs? " f"{sentence}"),
        f"Write a sentence with the opposite meaning: {sentence}", ("Use this sentence in a " "short " "dialogue: " f"{sentence}"),
    ))  # fmt: skip


STREETS = _list(
    "Mill Lane, Harbour Street, Oak Avenue, Station Road, Market Square, River Walk, Hill "
    "Street, "
    "Garden Road"
)
CITIES = _list(
    "Lisbon, Oslo, Nairobi, Toronto, Lima, Hanoi, Vienna, Dublin, Osaka, Tunis, Prague, "
    "Auckland, Bogota, Ghent, "
    "Porto, Leeds"
)
MONTHS = _list(
    "January, February, March, April, May, June, July, August, September, October, "
    "November, "
    "December"
)
FORMATS = _list(
    "as JSON, as a CSV line, as a table, as bullet points, as YAML, as key: value lines"
)


def _extract(rng: random.Random) -> str:
    one, two = rng.sample(NAMES, 2)
    day = rng.randint(1, 28)
    year = rng.randint(2015, 2026)
    month = rng.choice(MONTHS)
    city = rng.choice(CITIES)
    thing = rng.choice(GOODS)
    count = rng.randint(2, 60)
    price = rng.randint(2, 90)
    texts = (
        (f"{one} ordered {count} {thing} on {day} {month} {year} for {price} euros. Please " "send " "them " "to " f"{rng.randint(1, 99)} " f"{rng.choice(STREETS)}, " f"{city}."),
        (f"The workshop takes place in {city} on {month} {day}, {year}, from " f"{rng.randint(8, 11)} am " "to " f"{rng.randint(1, 6)} " "pm. " "Contact: " f"{one.lower()}@example.org."),
        (f"Hello, this is {one}. My flight to {city} on {day} {month} was cancelled, " f"booking {rng.randint(10000, 99999)}. " f"{two} " "was " "on " "the " "same " "flight."),
        (f"{one} ({rng.randint(19, 70)}) from {city} and {two} ({rng.randint(19, 70)}) from " f"{rng.choice(CITIES)} " "won " "the " "chess " "tournament " "in " f"{year}."),
        (f"Invoice {rng.randint(100, 999)}: {count} {thing} at {price} dollars each, " "delivered to " f"{one} " "in " f"{city} " "in " f"{month} " f"{year}."),
        (f"Error 2{rng.randint(100, 999)} in module " f"{rng.choice(['billing', 'login', 'search', 'upload'])} " "at " f"{rng.randint(10, 23)}:{rng.randint(10, 59)}, reported " "by " f"{one}, " "fixed " "by " f"{two}."),
        (f"Room for {rng.randint(2, 5)} in {city}, {price} euros a night, breakfast " "included, free " "from " f"{day} " f"{month}. " "Ask " "for " f"{one}."),
    )  # fmt: skip
    return rng.choice((
        "Extract the names, places and dates from this text {form}:\n\n{text}", ("Turn this into " "structured " "data " "{form}: " "{text}"),
        "Which numbers are in this text, and what do they mean?\n{text}", ("Extract all facts " "{form}.\n\nText: " "{text}"),
        "Who, what, where, when? Answer {form}.\n{text}", "Write a reply to this message: {text}", ("Summarize " "in " "at " "most " "eight " "words: " "{text}"),
    )).format(form=rng.choice(FORMATS), text=rng.choice(texts))  # fmt: skip


PRODUCTS = _list(
    "headset, toaster, office chair, hiking boots, novel, restaurant, hotel room, phone "
    "case, coffee machine, board game, "
    "film, app"
)
GOOD = _list(
    "works exactly as promised, arrived two days early, is worth every cent, looks even "
    "better than in the pictures, "
    "surprised me"
)
BAD = _list(
    "broke after a week, was far too expensive, smelled strange, did not fit, was louder "
    "than I had hoped, "
    "bored me"
)


def _classify(rng: random.Random) -> str:
    parts = [rng.choice(GOOD), rng.choice(BAD)]
    rng.shuffle(parts)
    review = (
        f"The {rng.choice(PRODUCTS)} "
        f"{rng.choice([parts[0], f'{parts[0]}, but it {parts[1]}'])}. "
        f"{rng.choice(['I would buy it again.', 'Never again.', 'It is all right.', ''])}"
    ).strip()
    return rng.choice((
        "Is this review positive, negative or mixed? {r}", ("Classify the sentiment (positive, " "negative, " "neutral): " "{r}"), ("Write " "a " "friendly " "answer " "to " "this " "review: " "{r}"),
        "Rate this review from 1 to 5 stars and say why: {r}", ("What does the customer like, " "and " "what " "not?\n\"{r}\""), ("Rewrite this review " "so " "that " "it " "is " "more " "helpful: " "{r}"),
    )).format(r=review)  # fmt: skip


CODE_LANGUAGES = _list(
    "JavaScript, TypeScript, Java, C, C++, Go, Rust, C#, Ruby, Kotlin, PHP, Bash, Swift, Python, R"
)
JOBS = _list("""counts the vowels of a text, reads a file line by line, prints a multiplication table, checks whether a year is a leap year, removes
    blank lines from a file, downloads a web page, finds the largest file in a folder, converts Celsius to Fahrenheit, shuffles a deck of cards,
    draws a triangle of stars, implements a stack, implements a queue with two stacks, parses a date, validates an email address, counts how often
    each word occurs, merges two sorted lists, transposes a matrix, computes compound interest, generates a random password, renames all files in a
    folder, groups records by a key, formats bytes for people, implements a simple timer, plays tic-tac-toe, plays hangman, sums the digits of a
    number, rotates a list, caches the results of a slow function, retries a request three times, converts a number to Roman numerals, sorts
    people by age and then by name, splits a list into chunks, prints a calendar of a month, implements binary search, implements a linked list,
    encrypts a text with Caesar's cipher, converts JSON to CSV, draws a bar chart in the terminal, computes the distance between two points,
    simulates dice rolls, implements a bank account class, flattens a nested list, checks balanced brackets, finds the most common letter""")
TABLES = (
    "a table orders(id, customer_id, total, created_at)", ("tables students(id, name) and " "grades(student_id, " "subject, " "grade)"),
    "a table employees(id, name, department, salary)", ("tables books(id, title, author_id) and " "authors(id, " "name)"),
    "a table logs(time, level, message)", ("tables films(id, title, year) and " "ratings(film_id, " "stars)"),
)  # fmt: skip
QUERIES = _list("""the ten largest totals, the average of each group, all rows of the last seven days, names that occur twice, the newest row of
    each group, rows without a partner in the other table, the share of each group in percent, the second largest value, how many rows there
    are per month, everything in alphabetical order, the median, rows whose name begins with A""")


def _code(rng: random.Random) -> str:
    language, other = rng.sample(CODE_LANGUAGES, 2)
    job = rng.choice(JOBS)
    what = rng.choice(TOPICS["programming"])
    return rng.choice((
        f"Write a program in {language} that {job}.", f"Write a {language} function that {job}.", ("Write a " "short " f"{language} " "script " "that " f"{job}. " "Explain " "it."),
        f"Show me code that {job}, once in {language} and once in {other}.", ("How do I write " "something " "in " f"{language} " "that " f"{job}?"),
        f"Give a short example of {what} in {language}.", (f"Write a class in {language} " "that " f"{job}."), (f"{language} vs {other}: which " "is " "better " "for " "a " "program " "that " f"{job}?"),
        f"I have {rng.choice(TABLES)}. Write an SQL query for {rng.choice(QUERIES)}.", ("Write " "pseudocode " "for " "a " "program " "that " f"{job}."),
        f"Write a Bash one-liner that {job}.", ("What is a good design for a program that " f"{job}? " "Name " "the " "parts."), ("Write a README for " "a " "small " "tool " "in " f"{language} " "that " f"{job}."),
        ("Write a regular expression that finds " f"{rng.choice(['dates', 'phone numbers', 'hex colours', 'URLs', 'times', 'prices', 'file names', 'version numbers'])} and explain it."),
        ("Write an HTML page with " f"{rng.choice(['a form', 'a table', 'a navigation bar', 'a photo gallery', 'a price list', 'a quiz'])} about {rng.choice(SUBJECTS)}."),
    ))  # fmt: skip


OPINIONS = _list("""homework should be abolished, cities should ban cars, everybody should learn to program, school should start later, zoos should
    be closed, remote work is better than office work, books are better than films, tabs are better than spaces, static typing is worth it,
    children should have phones, voting should be compulsory, museums should be free, a four-day week is a good idea, AI will help teachers,
    comments in code are a smell, paper books will disappear""")
CHAT = _list("""Hi!, Good morning!, Who are you?, What can you do?, Tell me a joke., Tell me a joke about programmers., Thank you!, Surprise me., How
    are you today?, Tell me something interesting., I am bored., Can you help me with my homework?, Give me a riddle., Tell me a riddle and its
    answer., What is a good hobby?, Motivate me., Write a tongue twister., Give me a word of the day., Explain a proverb., Tell me a fun fact.""")


def _topic(rng: random.Random, templates: tuple[str, ...]) -> str:
    field = rng.choice(FIELDS)
    a, b = rng.sample(TOPICS[field], 2)
    return rng.choice(templates).format(topic=a, a=a, b=b, learner=rng.choice(LEARNERS))


def _story(rng: random.Random) -> str:
    hero = rng.choice(HEROES)
    place = rng.choice(PLACES)
    event = rng.choice(EVENTS)
    form = rng.choice(FORMS)
    poem = rng.choice(POEMS)
    subject = rng.choice(SUBJECTS)
    text = rng.choice((
        f"Write a {form} about {hero} who {event} {place}.", f"Write a {form}: {hero}, {place}.", ("Tell me " "a " f"{form} " "in " "which " f"{hero} " f"{event}."),
        f"Write a {poem} about {subject}.", f"A {poem} about {hero} {place}, please.", ("Invent a title and a " "first " "sentence " "for " "a " f"{form} " "about " f"{hero}."),
        f"Describe {hero} {place} in five sentences.", (f"Write a {form} set {place} about " f"{subject}."), (f"Plan a {form} " "in " "which " f"{hero} " f"{event}: " "plot, " "characters, " "end."),
    ))  # fmt: skip
    return re.sub(r"\b([Aa]) (?=[aeio])", r"\1n ", text)


def _email(rng: random.Random) -> str:
    manner, sender, reader, purpose = (
        rng.choice(part) for part in (MANNERS, SENDERS, READERS, PURPOSES)
    )
    return rng.choice((
        f"Write {manner} email from {sender} to {reader} {purpose}.", (f"I am {sender}. Write " f"{manner} " "message " "to " f"{reader} " f"{purpose}."),
        f"Draft {manner} letter to {reader} {purpose}.", (f"Write a subject line and {manner} " "email " f"{purpose}."), ("What should " "an " "email " "from " f"{sender} " f"{purpose} " "contain?"),
    ))  # fmt: skip


def _enumerate(rng: random.Random) -> str:
    what = rng.choice(LISTS)
    count = rng.choice(["three", "five", "seven", "eight", "ten", "twelve"])
    return rng.choice((
        f"List {count} {what}.", f"Give me {count} {what}.", (f"{count.capitalize()} " f"{what}, " "please."), ("I need " f"{count} " f"{what}, " "each " "with " "one " "sentence."),
        f"Make a table of {count} {what}.", f"Make a numbered list: {what}.", (f"Suggest {count} " f"{what} " "and " "say " "why."),
    ))  # fmt: skip


def _advise(rng: random.Random) -> str:
    situation = rng.choice(SITUATIONS)
    lower = situation if situation.startswith("I ") else situation[0].lower() + situation[1:]
    return rng.choice(ADVICE).format(s=situation[0].upper() + situation[1:], t=lower)


def _argue(rng: random.Random) -> str:
    opinion = rng.choice(OPINIONS)
    return rng.choice((
        f"Some people say that {opinion}. What speaks for it, what against it?", ("Give three " "arguments " "for " "the " "claim " "that " f"{opinion}."), ("Argue " "against " "this: " f"{opinion}."),
        f"Write a debate between two people about whether {opinion}.", ("Write a short essay: " f"{opinion}?"), ("Do " "you " "think " "that " f"{opinion}?"),
        f"How could somebody be convinced that {opinion}?", ("Write a balanced paragraph on the " "question " "whether " f"{opinion}."),
    ))  # fmt: skip


ABOUT_TEXT = (
    "Summarize this text in one sentence:\n\n{p}", "Summarize:\n{p}", ("What is this text " "about?\n\n{p}"), ("Rewrite " "this " "in " "simpler " "words:\n\n{p}"),
    "Give this paragraph a title.\n\n{p}", "List the key points of this text.\n\n{p}", ("Write two questions " "that " "this " "text " "answers, " "with " "answers.\n\n{p}"),
    "{p}\n\nSummarize the text above in your own words.", ("Which technical terms does this text " "use? " "Explain " "each " "in " "one " "sentence.\n\n{p}"),
    "Shorten this to half of its length:\n\n{p}", "Turn this paragraph into bullet points:\n\n{p}", ("{p}\n\nExplain " "this " "to " "{learner}."),
    "Translate this into {language}:\n\n{p}", "Proofread this text and improve its style.\n\n{p}", ("Extract " "five " "keywords " "from " "this " "text: " "{p}"),
)  # fmt: skip


def chat_requests(seed: int, paragraphs: list[str]) -> Iterator[str]:
    """Requests without end; some come twice. paragraphs: texts to summarize, rewrite or translate."""
    rng = random.Random(seed)

    def about_text(rng: random.Random) -> str:
        text = {
            "p": rng.choice(paragraphs),
            "learner": rng.choice(LEARNERS),
            "language": rng.choice(LANGUAGES),
        }
        return rng.choice(ABOUT_TEXT).format(**text)

    makers: dict[Callable[[random.Random], str], int] = {
        lambda rng: _topic(rng, EXPLAIN): 20,
        lambda rng: _topic(rng, COMPARE): 7,
        lambda rng: rng.choice(HOW).format(task=rng.choice(TASKS), learner=rng.choice(LEARNERS)): 10,
        _story: 9, _email: 6, _enumerate: 5, _advise: 4, _argue: 2, _math: 14, _translate: 4, _rewrite: 4, _extract: 4, _classify: 2,
        _code: 10, lambda rng: rng.choice(CHAT): 1,
    }  # fmt: skip
    if paragraphs:
        makers[about_text] = 8
    while True:
        yield rng.choices(list(makers), list(makers.values()))[0](rng)


def paragraphs_of(folders: list[Path]) -> list[str]:
    """Paragraphs of plain prose, 35 to 110 words, from the descriptions and docstrings of the
    packages in these folders.
    """
    found: dict[str, None] = {}
    for folder in folders:
        for file in sorted(folder.glob("*.dist-info/METADATA")):
            found |= dict.fromkeys(
                _prose(
                    email.message_from_string(
                        file.read_text("utf-8", errors="ignore")
                    ).get_payload()
                )
            )
        for file in sorted(folder.rglob("*.py")):
            docstring = re.match(
                r'\s*(?:#[^\n]*\n\s*)*[rR]?"""(.*?)"""',
                file.read_text("utf-8", errors="ignore"),
                re.DOTALL,
            )
            found |= dict.fromkeys(_prose(docstring[1] if docstring else ""))
    return list(found)


def _prose(text: object) -> Iterator[str]:
    for part in re.split(r"\n\s*\n", str(text)):
        paragraph = " ".join(part.split())
        letters = sum(letter.isalpha() or letter == " " for letter in paragraph)
        plain = re.fullmatch(r"[A-Z][^|<>{}\[\]*=]*[.!]", paragraph) and not re.search(
            r">>>|::|http|\$ |``|~~|tests?\b", paragraph
        )
        if plain and 35 <= len(paragraph.split()) <= 110 and letters > 0.92 * len(paragraph):
            yield paragraph
