// The report's parts, in their order on the page.
startTheme();
startNavigation();
startVerdict();
startPerplexity();
startTable();
startDiversity();
startFamily();
startLearning();
document.documentElement.dataset.ready = "true";
